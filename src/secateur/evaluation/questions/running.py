"""Tasks of lm-eval: found before a model is opened, then asked, and read problem by problem."""

import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from secateur.calibration.sources import data_folder, read_bytes
from secateur.errors import ConfigError, CorpusError
from secateur.evaluation.programs.journal import Journal
from secateur.evaluation.proportions import mean_share
from secateur.evaluation.questions.catalogue import QUESTIONS, Documents, Question
from secateur.evaluation.scores import Scores
from secateur.runtime.loaded import LoadedModel

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

SAMPLES = "samples.jsonl"
_SEED = 1234  # of the draw of solved examples, as lm-eval has it


@dataclass(frozen=True)
class Loaded:
    """A task that is ready to be asked.

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
    sha256
        Of the documents.
    """

    task: "ConfigurableTask"
    question: Question
    places: tuple[int, ...]
    documents: int
    sha256: str

    def described(self) -> dict[str, Any]:
        """Return what results depend on."""
        import lm_eval

        return {
            "sha256": self.sha256,
            "problems": len(self.places),
            "problems_of_task": self.documents,
            "shots": self.question.shots,
            "lm_eval": str(lm_eval.__version__),
        }

    def ask(self, model: LoadedModel, place: Path, progress: Callable[[int, int], None], *, batch: int) -> Scores:
        """Let a model answer into PLACE/samples.jsonl, and return what its answers are worth."""
        from lm_eval.evaluator import evaluate

        from secateur.evaluation.questions.adapter import JournalLM

        place.mkdir(parents=True, exist_ok=True)
        name = self.question.name
        with Journal(place / SAMPLES) as journal:
            lm = JournalLM(model, journal, progress, places=self.places, batch=batch)
            found = evaluate(
                lm,
                {"tasks": {name: self.task}, "groups": {}, "group_map": {}},
                samples={name: list(self.places)},
                bootstrap_iters=0,
                log_samples=True,
            )
        return _scores(self, found["samples"][name])


def load_question(name: str, data: Path | None, problems: int | None) -> Loaded:
    """Find the documents of a task: those of a data folder, else what lm-eval gets from the hub.

    Raises
    ------
    ConfigError
        When lm-eval is not installed.
    CorpusError
        When no place has the documents, or a file is not what it should be.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(f"{name} is asked by lm-eval, which is not installed: pip install 'secateur[lm-eval]'")
    for noisy in ("lm_eval", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    question = QUESTIONS[name]
    task, tried = _of_folder(question, data)
    task = task or _of_hub(question, tried)
    task.set_config(key="num_fewshot", value=question.shots)
    task.set_fewshot_seed(seed=_SEED)
    documents = list(task.eval_docs)
    places = _chosen(len(documents), problems)
    return Loaded(task, question, places, len(documents), _hash(documents))


def _of_folder(question: Question, data: Path | None) -> "tuple[ConfigurableTask | None, str]":
    """Return the task over the documents of the data folder, or None and the file that is not there."""
    folder = data_folder(data)
    if folder is None or question.read is None:
        return None, ""
    wanted = folder / "benchmarks" / question.file
    path = next((one for one in _packed(wanted) if one.is_file()), None)
    if path is None:
        return None, str(wanted)
    import datasets
    from lm_eval.api.task import ConfigurableTask

    try:
        documents = list(question.read(read_bytes(path).decode()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path} has no documents of {question.name}: {error!r}") from error

    def dataset(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_list(documents)}

    config = _own_settings(question.own_settings) if question.own_settings else question.config
    return ConfigurableTask(
        config={**config, "task": question.name, "custom_dataset": dataset, "test_split": "test"}
    ), ""


def _own_settings(file: str) -> dict[str, Any]:
    """Return the settings of a task of lm-eval, less those of where its documents are."""
    import lm_eval.tasks

    settings = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / file).read_text(encoding="utf-8"))
    return {key: value for key, value in settings.items() if key not in ("dataset_path", "dataset_name", "tag")}


def _packed(path: Path) -> tuple[Path, ...]:
    return path, path.with_name(f"{path.name}.gz"), path.with_name(f"{path.name}.bz2")


def _of_hub(question: Question, tried: str) -> "ConfigurableTask":
    try:
        loaded = _manager().load([question.stock])
    except Exception as error:  # datasets and its clients raise what they like without a network
        advice = f" (tried {tried})" if tried else ""
        where = f"put the file at benchmarks/{question.file} in a folder that --data names" if question.file else ""
        raise CorpusError(
            f"no documents of {question.name} were found{advice}, and the hub gives none "
            f"({type(error).__name__}); {where or 'allow access to the hub'}"
        ) from error
    task: ConfigurableTask = loaded["tasks"][question.stock]
    return task


@functools.cache
def _manager() -> Any:
    """Return what finds lm-eval's tasks: it reads thousands of files for that."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _chosen(count: int, wanted: int | None) -> tuple[int, ...]:
    """Return the numbers of `wanted` documents, which follow from their numbers alone; None means all."""
    order = sorted(range(count), key=lambda number: hashlib.sha256(str(number).encode()).hexdigest())
    return tuple(sorted(order[:wanted]))


def _hash(documents: Documents) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _scores(loaded: Loaded, samples: list[dict[str, Any]]) -> Scores:
    """Return each metric's mean over problems, the one that counts first."""
    values: dict[str, dict[str, float]] = {}
    filters = {sample["filter"] for sample in samples}
    for sample in samples:
        for metric in sample["metrics"]:
            key = metric if len(filters) == 1 else f"{metric},{sample['filter']}"
            values.setdefault(key, {})[f"{loaded.question.name}/{sample['doc_id']}"] = float(sample[metric])
    metric = loaded.question.metric
    if metric not in values or not all(math.isfinite(one) for one in values[metric].values()):
        raise CorpusError(f"lm-eval gives no {metric} of {loaded.question.name}, but {', '.join(values)}")
    ordered = [metric, *(one for one in values if one != metric)]
    means = {one: mean_share(list(values[one].values())) for one in ordered}
    return Scores(metric, means, len(loaded.places), loaded.documents, values[metric])
