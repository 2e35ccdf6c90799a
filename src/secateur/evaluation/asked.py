"""What models are asked beside held-out text: programs, gaps, questions and sentences, found before one is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import ConfigError
from secateur.evaluation.infilling import EACH, Gap, gaps, hash_of_gaps
from secateur.evaluation.programs.generation import Asking
from secateur.evaluation.programs.planning import benchmarks_of, plan_programs, settings_of
from secateur.evaluation.programs.run import Programs
from secateur.evaluation.questions.loading import load_question
from secateur.evaluation.tasks import Task
from secateur.evaluation.translating import Loaded as Sentences
from secateur.evaluation.translating import load_sentences

if TYPE_CHECKING:
    from secateur.evaluation.questions.asking import Loaded


@dataclass(frozen=True)
class Asked:
    """Tasks that models answer.

    Attributes
    ----------
    programs
        What runs programs; None without such tasks.
    infills
        By task the gaps that are to be filled.
    questions
        By task what lm-eval asks.
    sentences
        By task what is to be translated.
    batch
        Answers that are computed together.
    """

    programs: Programs | None
    infills: dict[str, list[Gap]]
    questions: "dict[str, Loaded]"
    sentences: dict[str, Sentences]
    batch: int

    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """Return for each task what results depend on: hashes, how many problems, versions of what asks or runs."""
        found = {} if self.programs is None else benchmarks_of(self.programs)
        found |= {task: {"sha256": hash_of_gaps(some), "problems": len(some)} for task, some in self.infills.items()}
        found |= {task: one.described() for task, one in self.questions.items()}
        return found | {task: one.described() for task, one in self.sentences.items()}

    def settings(self) -> dict[str, Any]:
        """Return what answers depend on beside the tasks."""
        if self.programs is not None:
            return settings_of(self.programs)
        return {"batch": self.batch} if self.questions or self.sentences else {}


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
    infills = {task.name: gaps(task.domain, data, problems or EACH) for task in tasks if task.is_infill}
    questions = {task.name: load_question(task.name, data, problems) for task in tasks if task.is_question}
    sentences = {task.name: load_sentences(task.domain, data, problems) for task in tasks if task.is_translation}
    return Asked(programs, infills, questions, sentences, asking.batch)
