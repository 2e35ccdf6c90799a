"""What models have answered: lines with `task_id` and `completion`, from this tool or any other."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.calibration.sources import read_bytes
from secateur.errors import ConfigError
from secateur.evaluation.programs.problem import Problem


@dataclass(frozen=True)
class Sample:
    """One answer to one problem.

    Attributes
    ----------
    task_id
        Of the problem.
    number
        Which of the answers to it, from 0.
    completion
        What follows the prompt.
    """

    task_id: str
    number: int
    completion: str


def read_samples(path: Path, problems: Mapping[str, Problem]) -> list[Sample]:
    """Read answers to any of the problems, in the order of the file.

    Raises
    ------
    ConfigError
        That names the line: no JSON, no task_id or completion, or a problem that the task does not have.
    """
    found: list[Sample] = []
    counts: defaultdict[str, int] = defaultdict(int)
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        task_id, completion = _fields(path, number, line)
        if task_id not in problems:
            known = ", ".join(list(problems)[:3])
            raise ConfigError(f"{path}, line {number}: the task has no problem {task_id!r}; it has {known}, ...")
        found.append(Sample(task_id, counts[task_id], completion))
        counts[task_id] += 1
    if not found:
        raise ConfigError(f"{path} has no samples; each line is an object with task_id and completion")
    return found


def _fields(path: Path, number: int, line: bytes) -> tuple[str, str]:
    try:
        record: Any = json.loads(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path}, line {number}: expected an object with task_id and completion, got {line[:60]!r}")
    task_id, completion = record.get("task_id"), record.get("completion")
    if not isinstance(task_id, str | int) or isinstance(task_id, bool) or not isinstance(completion, str):
        raise ConfigError(f"{path}, line {number}: task_id and completion are strings; got {line[:60]!r}")
    return str(task_id), completion


def by_problem(passed: Iterable[tuple[str, bool]]) -> dict[str, tuple[int, int]]:
    """Return {task_id: (answers, of which are right)} in the order in which problems come first."""
    found: dict[str, tuple[int, int]] = {}
    for task_id, right in passed:
        answers, correct = found.get(task_id, (0, 0))
        found[task_id] = answers + 1, correct + right
    return found
