"""What models are asked beside held-out text: programs, and other tasks, all found before a model is opened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from secateur.errors import ConfigError
from secateur.evaluation.infilling import EACH, Gaps, gaps
from secateur.evaluation.journal import Journal
from secateur.evaluation.programs.generation import Asking
from secateur.evaluation.programs.planning import benchmarks_of, plan_programs, settings_of
from secateur.evaluation.programs.run import Programs
from secateur.evaluation.questions.loading import load_question
from secateur.evaluation.scores import Scores
from secateur.evaluation.tasks import INFILL, TRANSLATION, Task
from secateur.evaluation.translating import load_sentences
from secateur.runtime.loaded import LoadedModel


class Answered(Protocol):
    """A task whose answers nothing has to be run for: gaps, questions, sentences. A new kind is one more of these."""

    @property
    def sha256(self) -> str:
        """A hash of all that is asked, and of what is right."""

    def described(self) -> dict[str, Any]:
        """Return what results depend on: `sha256`, `problems`, versions of what asks and judges."""

    def ask(self, model: LoadedModel, journal: Journal, progress: Callable[[int, int], None], batch: int) -> Scores:
        """Let a model answer, with what a journal has already, and return what the answers are worth."""


@dataclass(frozen=True)
class Asked:
    """Tasks that models answer.

    Attributes
    ----------
    programs
        What runs programs; None without such tasks.
    answered
        By name the others.
    batch
        Answers that are computed together.
    """

    programs: Programs | None
    answered: dict[str, Answered]
    batch: int

    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """Return for each task what results depend on: hashes, how many problems, versions of what asks or runs."""
        found = {} if self.programs is None else benchmarks_of(self.programs)
        return found | {task: one.described() for task, one in self.answered.items()}

    def settings(self) -> dict[str, Any]:
        """Return what answers depend on beside the tasks."""
        if self.programs is not None:
            return settings_of(self.programs)
        return {"batch": self.batch} if self.answered else {}


def plan_asked(
    tasks: Sequence[Task],
    asking: Asking,
    *,
    problems: int | None,
    data: Path | None,
    run_generated_code: bool,
    unsafe: bool,
    workers: int | None,
) -> Asked:
    """Find all that is asked; parameters and errors are those of `evaluate`."""
    if problems is not None and problems < 1:
        raise ConfigError(f"problems is {problems}; at least 1 is needed")
    programs = plan_programs(
        [task.name for task in tasks if task.runs_programs],
        asking,
        problems=problems,
        data=data,
        run_generated_code=run_generated_code,
        unsafe=unsafe,
        workers=workers,
    )
    others = [task for task in tasks if task.has_answers and not task.runs_programs]
    return Asked(programs, {task.name: _found(task, problems, data) for task in others}, asking.batch)


def _found(task: Task, problems: int | None, data: Path | None) -> Answered:
    if task.kind == INFILL:
        return Gaps(tuple(gaps(task.domain, data, problems or EACH)))
    if task.kind == TRANSLATION:
        return load_sentences(task.domain, data, problems)
    return load_question(task.name, data, problems)
