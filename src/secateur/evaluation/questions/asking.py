"""A task of lm-eval that is ready to be asked, and what a model's answers are worth, document by document."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.errors import CorpusError
from secateur.evaluation.journal import Journal
from secateur.evaluation.proportions import mean_share
from secateur.evaluation.questions.catalogue import Question
from secateur.evaluation.scores import Scores
from secateur.runtime.loaded import LoadedModel

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

IMPOSSIBLE, SHORTENED = "impossible", "shortened"
_SEED = 1234  # of the draw of solved examples, as lm-eval has it


@dataclass(frozen=True)
class Loaded:
    """A task that is ready to be asked; see `secateur.evaluation.asked.Answered`.

    Attributes
    ----------
    task
        lm-eval's.
    question
        What is asked, and which metric counts.
    places
        Numbers of the documents that are asked, rising.
    documents
        How many the task has.
    source
        Where they come from.
    sha256
        Of all that is asked, and of how answers are read.
    """

    task: "ConfigurableTask"
    question: Question
    places: tuple[int, ...]
    documents: int
    source: str
    sha256: str

    def described(self) -> dict[str, Any]:
        """Return what results depend on."""
        import lm_eval

        return {
            "sha256": self.sha256,
            "source": self.source,
            "problems": len(self.places),
            "problems_of_task": self.documents,
            "shots": self.question.shots,
            "lm_eval": f"{lm_eval.__version__} {self.question.stock}",
        }

    def ask(self, model: LoadedModel, journal: Journal, progress: Callable[[int, int], None], batch: int) -> Scores:
        """Let a model answer, and return what its answers are worth.

        Raises
        ------
        ConfigError
            When a question does not fit into the model, or the journal is that of something else.
        """
        from lm_eval.evaluator import evaluate

        from secateur.evaluation.questions.adapter import JournalLM
        from secateur.evaluation.questions.loading import quiet

        name = self.question.name
        self.task.set_fewshot_seed(seed=_SEED)
        with quiet(), np.errstate(invalid="ignore"):  # minus infinity by itself
            lm = JournalLM(model, journal, progress, name=name, places=self.places, batch=batch)
            found = evaluate(
                lm,
                {"tasks": {name: self.task}, "groups": {}, "group_map": {}},
                samples={name: list(self.places)},
                bootstrap_iters=0,
                log_samples=True,
            )
        shortened = sum(one.get(SHORTENED, False) for one in journal.records)
        return _scores(self, found["samples"][name], shortened)


def built(task: "ConfigurableTask", places: tuple[int, ...]) -> "list[Instance]":
    """Return the requests of some documents, the same ones each time."""
    task.set_fewshot_seed(seed=_SEED)
    task.build_all_requests(samples=list(places))
    requests: list[Instance] = task.instances
    return requests


def _scores(loaded: Loaded, samples: list[dict[str, Any]], shortened: int) -> Scores:
    """Return each metric's mean over documents, the one that counts first.

    A document whose choices all have no likelihood, because a trimmed head does not compute their tokens, counts as
    wrong.
    """
    values: dict[str, dict[str, float]] = {}
    filters = {sample["filter"] for sample in samples}
    impossible = set()
    for sample in samples:
        name = f"{loaded.question.name}/{sample['doc_id']}"
        if loaded.task.OUTPUT_TYPE == "multiple_choice" and all(
            one[0] == -math.inf for one in sample["filtered_resps"]
        ):
            impossible.add(name)
        for metric in sample["metrics"]:
            key = metric if len(filters) == 1 else f"{metric},{sample['filter']}"
            values.setdefault(key, {})[name] = 0.0 if name in impossible else float(sample[metric])
    metric = loaded.question.metric
    if metric not in values or not all(math.isfinite(one) for one in values[metric].values()):
        raise CorpusError(f"lm-eval gives no {metric} of {loaded.question.name}, but {', '.join(values)}")
    ordered = [metric, *(one for one in values if one != metric)]
    means = {one: mean_share(list(values[one].values())) for one in ordered}
    outcomes = {IMPOSSIBLE: len(impossible), SHORTENED: shortened}
    outcomes = {outcome: count for outcome, count in outcomes.items() if count}
    return Scores(metric, means, len(loaded.places), loaded.documents, values[metric], outcomes)
