"""Runs the command line in this process and says what it did; makes the tiny inputs that its tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from secateur.cli import main


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of one run."""

    code: int
    out: str
    err: str


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Run `secateur ARGUMENTS` in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = ended.value.code
    return Outcome(0 if code is None else int(code), captured.out, captured.err)


def tree(*folders: Path) -> dict[str, bytes | None]:
    """Return what lies below some folders: the content of files, None for folders."""
    paths = sorted(path for folder in folders for path in folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Check that nothing below the folders is made, changed or removed meanwhile."""
    before = tree(*folders)
    yield
    after = tree(*folders)
    assert after.keys() == before.keys(), "something was left behind or lost"
    assert [name for name in before if after[name] != before[name]] == []


def write_sources(folder: Path, files: int = 24) -> Path:
    """Fill a folder with source files, some of which are held out; return it."""
    folder.mkdir(parents=True)
    for index in range(files):
        lines = [f"def function_{index}_{line}(value):\n    return value * {index + line}\n" for line in range(12)]
        (folder / f"module_{index}.py").write_text("\n".join(lines))
    return folder
