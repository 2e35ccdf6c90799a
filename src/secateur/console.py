"""What the command line shows: results on stdout, progress and remarks on stderr."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any


def result(content: Any, text: str, *, as_json: bool) -> None:
    """Print a result for a machine or for a person."""
    if as_json:
        print_json(content)
    else:
        sys.stdout.write(text.rstrip("\n") + "\n")


def print_json(content: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


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
    """Keep transformers' warnings and progress bars out of our output; call it before transformers is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
