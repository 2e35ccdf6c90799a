"""A file of JSON lines that grows while work goes on, and of which every whole line counts after an interruption."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from secateur.errors import ConfigError

SAMPLES = "samples.jsonl"  # the journal of answers, in a folder for each task


class Journal:
    """Appends records to a file; what an interrupted write has left of a line is taken away at first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = list(read_lines(path)) if path.exists() else []
        whole = sum(len(encode(record)) for record in self.records)
        self._file = path.open("ab")
        self._file.truncate(whole)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records, on the disk when this returns."""
        added = list(records)
        self._file.write(b"".join(encode(record) for record in added))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records += added

    def expect(self, task_ids: Sequence[str], first: int = 0) -> None:
        """Raise `ConfigError` when records from number `first` on are not answers to these problems, in this order."""
        for record, task_id in zip(self.records[first:], task_ids, strict=False):
            if record.get("task_id") != task_id:
                raise ConfigError(
                    f"{str(self.path)!r} has an answer to {record.get('task_id')!r}, not to {task_id!r}: "
                    "delete the folder to start afresh"
                )

    def in_batches(
        self,
        task_ids: Sequence[str],
        batch: int,
        answer: Callable[[slice], Iterable[dict[str, Any]]],
        progress: Callable[[int, int], None],
        first: int = 0,
    ) -> list[dict[str, Any]]:
        """Return a record for each problem, from number `first` on: those that are there, and then new ones.

        Work is gone on with from the last whole batch, because what is computed together decides on the last digits.

        Parameters
        ----------
        answer
            Gives the records of some of the problems, less `task_id`.
        progress
            Called with how many records there are, and how many there will be.

        Raises
        ------
        ConfigError
            As `expect`.
        """
        end = first + len(task_ids)
        self.expect(task_ids, first)
        known = min(len(self.records), end) - first
        done = known if known == len(task_ids) else known // batch * batch
        self.keep(first + done if done < len(task_ids) else None)
        progress(first + done, end)
        for begin in range(done, len(task_ids), batch):
            some = slice(begin, min(begin + batch, len(task_ids)))
            pairs = zip(task_ids[some], answer(some), strict=True)
            self.append({"task_id": task_id, **record} for task_id, record in pairs)
            progress(first + some.stop, end)
        return self.records[first:end]

    def keep(self, count: int | None) -> None:
        """Forget all but the first `count` records; None keeps all."""
        if count is not None and count < len(self.records):
            self.records = self.records[:count]
            self._file.truncate(sum(len(encode(record)) for record in self.records))
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()


def encode(record: dict[str, Any]) -> bytes:
    """Return a record as a line; the same record has the same bytes."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Give the records of a journal up to the first line that is not whole."""
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(record, dict) or encode(record) != line:
            return
        yield record
