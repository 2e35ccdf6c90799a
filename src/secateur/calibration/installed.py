"""Text that is already on the machine: the standard library, torch's headers, a JDK's source, package descriptions.

Nothing here is imported or run to be read, except `pydoc_data`, which is one dictionary of the standard library.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from secateur.calibration.documents import MAXIMUM_FILE_BYTES, MINIMUM_CHARACTERS, Document, decode_source
from secateur.calibration.sources import Source, SourceUnavailableError
from secateur.calibration.trees import read_tree
from secateur.errors import CorpusError

# Tests repeat each other, lib2to3 and the encodings are tables, config-* and pydoc_data are generated.
NOT_LIBRARY = (
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "turtledemo",
    "__phello__",
)
JDK_FOLDERS = ("/usr/lib/jvm/*", "/Library/Java/JavaVirtualMachines/*/Contents/Home")


@dataclass(frozen=True)
class StandardLibrary(Source):
    """Python: the source of the running interpreter's standard library, without its tests and tables."""

    name: str = "Python standard library"
    how_to_get: str = "install a Python that comes with its library source"
    folder: Path | None = None

    def missing(self) -> str | None:
        """Frozen interpreters carry no source."""
        return None if (self._folder() / "os.py").is_file() else f"no source in {self._folder()}"

    def version(self) -> str:
        """Python's own."""
        return platform.python_version()

    def licence(self) -> str:
        """Python's own."""
        return "PSF-2.0"

    def documents(self) -> Iterable[Document]:
        """Files named python/PATH; those that record how this one interpreter was built are left out."""
        for document in read_tree(self._folder(), {".py"}, skip=NOT_LIBRARY, prefix="python/"):
            if "_sysconfigdata" not in document.name and "/config-" not in document.name:
                yield document

    def _folder(self) -> Path:
        return self.folder or Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True)
class TorchHeaders(Source):
    """C++: the headers of ATen, c10 and torch that a PyTorch wheel carries, without the generated ATen/ops."""

    name: str = "PyTorch headers"
    how_to_get: str = "pip install torch"

    def missing(self) -> str | None:
        """Some distributions of torch leave the headers out."""
        return None if (_package_folder("torch") / "include" / "c10").is_dir() else "torch has no include folder here"

    def version(self) -> str:
        """Torch's own."""
        return _version("torch")

    def licence(self) -> str:
        """Torch's own."""
        return "BSD-3-Clause"

    def documents(self) -> Iterable[Document]:
        """Files named torch/PATH below the include folder."""
        include = _package_folder("torch") / "include"
        for part in ("ATen", "c10", "torch"):
            yield from read_tree(
                include / part, {".h", ".hpp", ".cuh"}, skip=("ops", "generated"), prefix=f"torch/{part}/"
            )


@dataclass(frozen=True)
class JdkSource(Source):
    """Java: the package `java` of java.base, from the src.zip of an installed JDK."""

    name: str = "JDK source"
    how_to_get: str = "install a JDK with its src.zip (Debian: apt-get install openjdk-17-source) or set JAVA_HOME"

    def missing(self) -> str | None:
        """Many JDK packages leave the source out, some leave a dangling link."""
        return None if self._archive() else "no lib/src.zip under JAVA_HOME, beside java on PATH or in /usr/lib/jvm"

    def version(self) -> str:
        """JAVA_VERSION of the JDK's `release` file."""
        archive = self._archive() or Path()
        for release in (archive.parent.parent / "release", archive.parent / "release"):
            if release.is_file():
                found = re.search(r'^JAVA_VERSION="?([^"\n]+)', release.read_text(errors="replace"), re.MULTILINE)
                if found:
                    return found[1]
        return "unknown"

    def licence(self) -> str:
        """OpenJDK's."""
        return "GPL-2.0-only WITH Classpath-exception-2.0"

    def documents(self) -> Iterable[Document]:
        """Files named jdk/java/PATH, read in memory."""
        archive = self._archive()
        if archive is None:
            raise SourceUnavailableError(f"{self.missing()}")
        try:
            with zipfile.ZipFile(archive) as members:
                for member in members.infolist():
                    name = member.filename.removeprefix("java.base/")  # JDK 8 has no modules
                    if re.fullmatch(r"java/.*\.java", name) and member.file_size <= MAXIMUM_FILE_BYTES:
                        text = decode_source(members.read(member))
                        if text is not None:
                            yield Document(f"jdk/{name}", text)
        except (OSError, zipfile.BadZipFile) as error:
            raise CorpusError(f"{archive} cannot be read: {error}; install the JDK's source again") from error

    def _archive(self) -> Path | None:
        homes = [Path(os.environ["JAVA_HOME"])] if os.environ.get("JAVA_HOME") else []
        java = shutil.which("java")
        if java:
            homes.append(Path(java).resolve().parent.parent)
        for pattern in JDK_FOLDERS:
            homes += sorted(Path("/").glob(pattern.lstrip("/")))
        archives = (home / place for home in homes for place in ("lib/src.zip", "src.zip"))
        return next((archive for archive in archives if archive.is_file()), None)


@dataclass(frozen=True)
class InstalledEnglish(Source):
    """General: Python's language reference, and the long descriptions of the packages that are installed."""

    name: str = "installed documentation"
    how_to_get: str = "install a Python that comes with pydoc_data"

    def missing(self) -> str | None:
        """Minimal interpreters leave pydoc_data out."""
        return None if importlib.util.find_spec("pydoc_data") else "this Python has no pydoc_data"

    def version(self) -> str:
        """Of the language reference; the hash in the provenance covers the descriptions."""
        return f"Python {platform.python_version()} and the packages installed"

    def licence(self) -> str:
        """A description has its package's licence."""
        return "PSF-2.0 and each package's own"

    def documents(self) -> Iterable[Document]:
        """Named python-reference/TOPIC and description/PACKAGE."""
        from pydoc_data.topics import topics

        found = {f"python-reference/{name}": text for name, text in topics.items()}
        for distribution in importlib.metadata.distributions():
            # A package that is found twice counts once, as for an import: the first on the path.
            found.setdefault(f"description/{_normalised(distribution)}", _description(distribution))
        for name in sorted(found):
            text = found[name].replace("\r\n", "\n")
            if len(text) >= MINIMUM_CHARACTERS:
                yield Document(name, text)


@dataclass(frozen=True)
class InstalledArchive(Source):
    """A package that a client could download but that is already installed; renders the same members.

    `module` is the top folder of the package, `member` a pattern for paths from there on, whose group is the name.
    """

    distribution: str
    module: str
    member: str
    licences: str

    def missing(self) -> str | None:
        """Looks for the folder without importing it."""
        return None if _package_folder(self.module).is_dir() else f"{self.distribution} is not installed"

    def version(self) -> str:
        """The distribution's own."""
        return f"{self.distribution}=={_version(self.distribution)}"

    def licence(self) -> str:
        """As declared for the package."""
        return self.licences

    def documents(self) -> Iterable[Document]:
        """Files whose path matches `member`."""
        return list(self._matching())

    def _matching(self) -> Iterator[Document]:
        root = _package_folder(self.module)
        for file in sorted(root.rglob("*.js")):
            found = re.fullmatch(self.member, f"{self.module}/{file.relative_to(root).as_posix()}")
            text = decode_source(file.read_bytes()) if found and file.is_file() else None
            if found and text is not None:
                yield Document(f"{self.distribution}/{found[1]}", text)


def _package_folder(name: str) -> Path:
    """Return the folder of a top-level package without importing it; one that does not exist if there is none."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else Path(f"/no package {name}")


def _version(distribution: str) -> str:
    """Return the version of a package, which one that was only put on the path does not tell."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _normalised(distribution: importlib.metadata.Distribution) -> str:
    return re.sub(r"[-_.]+", "-", str(distribution.metadata["Name"])).lower()


def _description(distribution: importlib.metadata.Distribution) -> str:
    metadata = distribution.metadata
    return str(metadata.get_payload() or metadata["Description"] or "") if metadata else ""  # type: ignore[attr-defined]
