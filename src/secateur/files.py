"""Files that are either whole or not there: hashes, atomic writes, the cache folder.

Lies beside `errors` and knows nothing about models.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import OutputError


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_path(text: str) -> Path:
    """Return the path that a user wrote, with the home folder in place of `~` where there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~someone` of whom this machine has not heard: a name like any other
        return Path(text)


def is_file(path: Path) -> bool:
    """Return whether there is such a file; a name that no file system takes is that of none."""
    try:
        return path.is_file()
    except OSError:  # the name is too long, or its folder may not be looked into
        return False


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that a disk or a quota is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or (error is not None and disk_is_full(error.__cause__))


def check_writable(target: Path) -> None:
    """Raise `OutputError` when a folder could not be made at `target`; leaves nothing behind."""
    try:
        parent = target.absolute().parent
        while not parent.exists():
            parent = parent.parent
        Path(tempfile.mkdtemp(dir=parent)).rmdir()
    except OSError as error:
        raise OutputError(f"output {str(target)!r} cannot be written: {error.strerror}; name another one") from error


def make_parents(path: Path) -> list[Path]:
    """Create the missing parents of `path`; return those that were missing, the innermost first."""
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that are empty, in this order, up to the first that is not."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def cache_folder() -> Path:
    """Return the folder for what can be made again: `$SECATEUR_CACHE` or `~/.cache/secateur`; it is created.

    Raises
    ------
    OutputError
        If the folder cannot be created.
    """
    named = os.environ.get("SECATEUR_CACHE")
    folder = Path(named).expanduser() if named else Path.home() / ".cache" / "secateur"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create the cache folder {folder} ({error.strerror}); set SECATEUR_CACHE to one you can write to"
        ) from error
    return folder


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` when the block ends, or vanishes when it raises.

    Parameters
    ----------
    target
        The folder to make. Its parents are created; it must not exist itself.

    Raises
    ------
    OutputError
        If `target` exists, before the block or by the time it ends, or its parent cannot be written.
    """

    def make() -> Path:
        # The process id says whose it is, mkdtemp makes two uses in one process differ.
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-{os.getpid()}-", dir=target.parent))
        partial.chmod(0o777 & ~_umask())
        return partial

    with _becoming(target, "folder", make, lambda partial: shutil.rmtree(partial, ignore_errors=True)) as partial:
        yield partial


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield an empty file beside `target` that becomes `target` when the block ends, or vanishes when it raises.

    Unlike `atomic_file` it replaces nothing. Parameter and errors are those of `atomic_folder`; an `OSError` in the
    block becomes one of them.
    """

    def make() -> Path:
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}-{os.urandom(4).hex()}")
        partial.touch(exist_ok=False)
        return partial

    with _becoming(target, "file", make, lambda partial: partial.unlink(missing_ok=True)) as partial:
        try:
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {target} ({error.strerror or error}); free some space or choose another path"
            ) from error


@contextmanager
def _becoming(target: Path, kind: str, make: Callable[[], Path], remove: Callable[[Path], None]) -> Iterator[Path]:
    """Yield what `make` makes; rename it to `target` when the block ends, `remove` it when the block raises."""
    _refuse_existing(target)
    created: list[Path] = []
    try:
        created = make_parents(target)
        partial = make()
    except OSError as error:
        remove_empty(created)
        reason = "its parent is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise OutputError(f"cannot create a {kind} beside {target} ({reason}); choose another path") from error
    try:
        yield partial
        # os.rename would replace a file, or an empty folder, without a word.
        _refuse_existing(target)
        try:
            partial.rename(target)
        except OSError as error:
            raise OutputError(f"cannot rename {partial} to {target} ({error.strerror})") from error
    except BaseException:
        remove(partial)
        remove_empty(created)
        raise


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part."""
    with atomic_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; the file written there replaces `path` when the block ends, or goes if it raises."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target} exists; choose another path or remove it first")


def _umask() -> int:
    """Return the umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
