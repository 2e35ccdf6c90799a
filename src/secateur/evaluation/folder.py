"""The folder `OUT.partial/` in which an evaluation works until it is renamed to OUT, and goes on when interrupted."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from secateur.checkpoint.format import describe_difference, dump_json, read_json
from secateur.errors import CheckpointError, ConfigError, OutputError
from secateur.files import atomic_write_bytes, check_writable, disk_is_full, make_parents, sha256_file

MANIFEST = "manifest.json"
RESERVED = (MANIFEST, "results.json")  # names that no folder of a model may have
_FORMAT = "secateur-programs"


@contextmanager
def working_folder(output: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Give the folder to work in, which becomes `output` when the block ends; an error leaves it to be gone on with.

    `settings` are all that its files depend on. The manifest has them from the beginning, so that they can be compared
    when work goes on, and at the end the SHA-256 of every other file too: that it has `files` says that all is whole.

    Raises
    ------
    OutputError
        When the output exists or cannot be written, or another process works on it.
    ConfigError
        When it was begun with other settings.
    """
    _refuse_existing(output)
    check_writable(output)
    folder = output.with_name(f"{output.name}.partial")
    make_parents(folder)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"another process works in {str(folder)!r}: wait for it or name another output") from None
    try:
        wanted = {"format": _FORMAT, "version": 1, **json.loads(json.dumps(settings))}
        _begin(folder, wanted)
        yield folder
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
        hashes = {str(path.relative_to(folder)): sha256_file(path) for path in files}
        atomic_write_bytes(folder / MANIFEST, dump_json({**wanted, "files": hashes}))
        _refuse_existing(output)
        folder.rename(output)
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise OutputError(
            f"the disk is full; what is finished is in {str(folder)!r}: make room, and the same command goes on with it"
        ) from None
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise OutputError(f"output {str(output)!r} exists: name another one or delete it")


def _begin(folder: Path, wanted: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"{str(folder)!r} is in the way: name another output or move it")
    folder.mkdir(exist_ok=True)
    for left in list(folder.rglob("*.partial-*")):  # of a write that was interrupted
        left.unlink()
    if not path.exists():
        if any(folder.iterdir()):
            raise OutputError(f"{str(folder)!r} is no interrupted evaluation: name another output or move it")
        atomic_write_bytes(path, dump_json(wanted))
        return
    try:
        begun = read_json(path)
    except CheckpointError:
        raise ConfigError(f"{str(path)!r} is damaged: delete the folder to start afresh") from None
    for key, value in wanted.items():
        if begun.get(key) != value:
            difference = describe_difference(key, begun.get(key), value)
            raise ConfigError(
                f"{str(folder)!r} was begun with another {difference}: use the same options to go on, or delete the "
                "folder to start afresh"
            )


def hash_of(*parts: str) -> str:
    """Return the SHA-256 of some texts, which no other texts have."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
