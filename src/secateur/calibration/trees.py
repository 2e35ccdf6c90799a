"""Reading source files from a folder: which are opened, and in which order when there are too many."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from secateur.calibration.documents import MAXIMUM_FILE_BYTES, Document, decode_source

MAXIMUM_TOTAL_BYTES = 32_000_000
NOT_SOURCES = frozenset({"node_modules", "bower_components", "site-packages", "dist-packages", "__pycache__", "venv"})


def read_tree(
    root: Path, suffixes: Collection[str], *, skip: Collection[str] = (), prefix: str = ""
) -> Iterator[Document]:
    """Yield the hand-written source files below a folder, up to 32 MB of them.

    Parameters
    ----------
    root
        Folder to walk. Links are not followed, hidden folders and installed packages not entered.
    suffixes
        Endings of the files to take, with the dot and in lower case.
    skip
        Further folder names, or paths below root with `/`, that are not entered.
    prefix
        Put before each name, which otherwise is the path below root with `/`.

    Of a larger tree the files whose names hash lowest are taken: a sample that is spread evenly and the same anywhere.
    """
    names = [name for name in _walk(root, lambda name: _skipped(name, skip)) if _suffix(name) in suffixes]
    total = 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        file = root / name
        try:
            if file.is_symlink() or file.stat().st_size > MAXIMUM_FILE_BYTES:
                continue
            text = decode_source(file.read_bytes())
        except OSError:  # a file that is not ours to read, or that went away since it was listed
            continue
        if text is not None:
            total += len(text)
            if total > MAXIMUM_TOTAL_BYTES:
                return
            yield Document(prefix + name, text)


def _walk(root: Path, skipped: Callable[[str], bool]) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        below = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if not skipped((below / name).as_posix())]
        for name in files:
            path = (below / name).as_posix()
            if not name.startswith(".") and _encodable(path):
                yield path


def _skipped(path: str, skip: Collection[str]) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith(".") or name in NOT_SOURCES or name in skip or path in skip


def _suffix(name: str) -> str:
    if ".min." in name:
        return ""
    return Path(name).suffix.lower()


def _encodable(name: str) -> bool:
    """Tell whether a file name is valid Unicode: one that is not has no stable name."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
