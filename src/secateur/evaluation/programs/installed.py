"""Compilers and interpreters of this machine, and what is made with them once and kept in the cache."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from secateur.errors import SandboxError
from secateur.files import cache_folder

_READY = "ready"
_SECONDS = 120
_SHARED = (
    ".local",
    ".local/share",
    ".local/lib",
    ".local/state",
    ".config",
    ".cache",
    "Documents",
    "Desktop",
    "Downloads",
)


def installed(name: str, advice: str) -> Path:
    """Return the path of a command, links followed; raises `SandboxError` with `advice` where there is none."""
    found = shutil.which(name)
    if found is None:
        raise SandboxError(f"{name} is not installed, and programs that need it cannot be run ({advice})")
    return Path(found).resolve()


def said(command: Path, *arguments: str) -> str:
    """Return the first line that a command writes."""
    return checked([str(command), *arguments]).partition("\n")[0].strip()


def checked(command: Sequence[str]) -> str:
    """Run a command of ours and return what it wrote; raises `SandboxError` when it fails."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"{command[0]} does not work here: {error}") from error
    if done.returncode != 0:
        raise SandboxError(f"{Path(command[0]).name} does not work here: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def outside_usr(*folders: Path) -> tuple[Path, ...]:
    """Return the folders that a sandbox has to be shown, beside /usr.

    Raises
    ------
    SandboxError
        When one of them is the user's home, a folder around it, or one in it that many programs keep their files in,
        such as `.local`. What else lies where a compiler is installed is shown with it.
    """
    home = Path.home().resolve()
    shown = tuple(dict.fromkeys(folder for folder in folders if not folder.is_relative_to("/usr")))
    for folder in shown:
        if home.is_relative_to(folder) or folder in [home / one for one in _SHARED]:
            raise SandboxError(
                f"to run programs a sandbox would have to be shown {str(folder)!r}, which has your own files: install "
                "the compiler or interpreter in a folder of its own"
            )
    return shown


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache that `make` has filled, now or before.

    It is made in its place: what compilers store knows its own path. A file that is written last says that it is whole.
    """
    folder = cache_folder().absolute() / "toolchains" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / _READY).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            for path in (folder, *folder.rglob("*")):  # programs run as another user
                path.chmod(0o755 if path.is_dir() else 0o644)
            (folder / _READY).touch()
    return folder
