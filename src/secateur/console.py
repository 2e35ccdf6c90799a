"""What the command line shows: results on stdout, progress and remarks on stderr."""

import io
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any


def prepare_streams() -> None:
    """Let no output end in a traceback: what the terminal cannot show is escaped, and a closed stream is none."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - open as long as the program runs
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Write to stdout at once; ends the program, as one that is done, when the reader, such as `head`, has left."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer has to go somewhere
        sys.exit(0)


def result(content: Any, text: str, *, as_json: bool) -> None:
    """Print a result for a machine or for a person."""
    if as_json:
        print_json(content)
    else:
        write(text.rstrip("\n") + "\n")


def print_json(content: Any) -> None:
    """Print one JSON document."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    write(json.dumps(content, indent=2, ensure_ascii=not unicode) + "\n")


def remark(text: Any) -> None:
    """Say something beside the result."""
    sys.stderr.write(f"{text}\n")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of equal keys as aligned text with a heading."""
    if not rows:
        return "(none)"
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def quiet_libraries() -> None:
    """Keep warnings and progress bars of libraries out of our output; call it before transformers is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def show_log(name: str) -> None:
    """Show on stderr what a part of the library says as it works."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(_Remarks())
        logger.setLevel(logging.INFO)


class _Remarks(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        remark(record.getMessage())


class Progress:
    """A progress bar with the time left, on stderr, drawn only where stderr is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        screen = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=screen,
            disable=not screen.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Say that `done` of `total` steps of a stage are over."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
