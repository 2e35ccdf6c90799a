"""A user's own path as a domain: a folder of source files, or a JSONL file with a `text` field."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from secateur.calibration.documents import Document
from secateur.calibration.sources import Source, SourceUnavailableError, read_json_lines, record_name
from secateur.calibration.trees import read_tree
from secateur.errors import CorpusError

SOURCE_SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("py", "pyi", "pyx", "java", "kt", "kts", "scala", "groovy", "clj", "cljs"),
        *("c", "cc", "cpp", "cxx", "h", "hh", "hpp", "hxx", "inl", "cu", "cuh", "m", "mm"),
        *("js", "jsx", "mjs", "cjs", "ts", "tsx", "mts", "vue", "svelte"),
        *("go", "rs", "zig", "nim", "d", "swift", "dart", "cs", "fs", "vb", "pas", "adb", "ads", "f", "f90"),
        *("rb", "php", "pl", "pm", "lua", "r", "jl", "sql", "sh", "bash", "ps1"),
        *("hs", "ml", "mli", "ex", "exs", "erl", "lisp", "el", "scm", "v", "sv", "vhd"),
    )
)
JSON_LINES = (".jsonl", ".jsonl.gz")


def path_source(path: Path) -> Source:
    """Return the source for a path that exists; raises `CorpusError` for a file that is not JSONL."""
    if path.is_dir():
        return SourceFolder(f"folder {path.resolve().name}", "put source files into it", path)
    if path.name.endswith(JSON_LINES):
        return JsonLinesFile(f"file {path.name}", "put lines with a 'text' field into it", path)
    raise CorpusError(f"{path} is not a corpus: give a folder of source files, or a file named .jsonl or .jsonl.gz")


@dataclass(frozen=True)
class SourceFolder(Source):
    """The source files below a folder, named by their path below it, split by a hash of that name."""

    folder: Path

    def missing(self) -> str | None:
        """A folder that exists can be read."""
        return None

    def version(self) -> str:
        """A folder has no version: the hash in the provenance says which text it was."""
        return "local"

    def licence(self) -> str:
        """What the user has is the user's to judge."""
        return "the user's own"

    def documents(self) -> Iterable[Document]:
        """All source files of known suffixes; raises when there is none."""
        documents = list(read_tree(self.folder, SOURCE_SUFFIXES))
        if not documents:
            raise SourceUnavailableError("it holds no source file of 200 characters or more, with a known suffix")
        return documents


@dataclass(frozen=True)
class JsonLinesFile(Source):
    """One document in each line, named by package and path if the line has them, otherwise by its number.

    Short texts stay: a line is what the user chose, unlike a file that happens to lie in a folder.
    """

    file: Path

    def missing(self) -> str | None:
        """A file that exists can be read."""
        return None

    def version(self) -> str:
        """As for a folder."""
        return "local"

    def licence(self) -> str:
        """As for a folder."""
        return "the user's own"

    def documents(self) -> Iterable[Document]:
        """All lines whose text is not blank; raises when there is none."""
        documents: dict[str, Document] = {}
        for number, record in read_json_lines(self.file):
            name = record_name(record)
            if not name or name in documents:
                name = f"{name} line {number}".strip()
            if record["text"].strip():
                documents[name] = Document(name, record["text"])
        if not documents:
            raise SourceUnavailableError("it holds no line with text")
        return list(documents.values())
