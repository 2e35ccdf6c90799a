"""One model on some benchmarks: its answers, then what came of them, in files that an interruption leaves whole."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.checkpoint.format import dump_json
from secateur.evaluation.drawing import drawn
from secateur.evaluation.journal import SAMPLES, Journal
from secateur.evaluation.programs.generation import Asking, generate
from secateur.evaluation.programs.languages import Toolchain
from secateur.evaluation.programs.loading import Loaded
from secateur.evaluation.programs.problem import Problem
from secateur.evaluation.programs.samples import Sample
from secateur.evaluation.programs.score import RESULTS, SUMMARY
from secateur.evaluation.programs.scoring import Scorer, scores_of, summary
from secateur.evaluation.sandbox.running import Runner
from secateur.evaluation.scores import Scores
from secateur.files import atomic_write_bytes
from secateur.runtime.loaded import LoadedModel


@dataclass(frozen=True)
class Programs:
    """Benchmarks that are run, and how.

    Attributes
    ----------
    loaded
        By task; `problems` of each are what is asked.
    toolchains
        By task.
    asking
        How models are asked.
    runner, workers, scale
        Where programs run, how many at a time, and how slow this machine is.
    """

    loaded: dict[str, Loaded]
    toolchains: dict[str, Toolchain]
    asking: Asking
    runner: Runner
    workers: int
    scale: float

    def answer(self, task: str, model: LoadedModel, folder: Path, progress: Callable[[int, int], None]) -> None:
        """Let a model answer all problems of a task into FOLDER/TASK/samples.jsonl."""
        place = folder / slug(task)
        place.mkdir(parents=True, exist_ok=True)
        with Journal(place / SAMPLES) as journal:
            generate(model, list(self.loaded[task].problems.values()), self.asking, journal, progress)

    def judge(self, task: str, folder: Path, style: str, progress: Callable[[int, int], None]) -> Scores:
        """Run the answers of FOLDER/TASK/samples.jsonl, and write results.jsonl and summary.json beside it."""
        loaded, place = self.loaded[task], folder / slug(task)
        with Journal(place / SAMPLES) as answers:
            samples = [Sample(one["task_id"], one["sample"], one["completion"]) for one in answers.records]
        scorer = Scorer(loaded.problems, self.toolchains[task], self.runner, self.workers, self.scale)
        with Journal(place / RESULTS) as journal:
            scorer.score(samples, journal, progress)
            results = list(journal.records)
        atomic_write_bytes(place / SUMMARY, dump_json({"task": task, **summary(results, loaded.n_problems)}))
        return scores_of(results, loaded.n_problems, style)


def slug(name: str) -> str:
    """Return a name as that of a file."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def chosen(problems: Mapping[str, Problem], count: int | None) -> dict[str, Problem]:
    """Return `count` problems in the order of their numbers; None means all."""

    def number(problem: Problem) -> int:
        return int((re.findall(r"\d+", problem.task_id) or ["0"])[0])

    return {problem.task_id: problem for problem in drawn(problems.values(), count, number)}
