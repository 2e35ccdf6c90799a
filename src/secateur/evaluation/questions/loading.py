"""Finds what a task of lm-eval asks, before a model is opened: in a data folder, else on the hub."""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from secateur.calibration.sources import data_folder, read_bytes
from secateur.errors import ConfigError, CorpusError
from secateur.evaluation.drawing import drawn
from secateur.evaluation.questions.asking import Loaded, built
from secateur.evaluation.questions.catalogue import QUESTIONS, Question

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask


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
    question = QUESTIONS[name]
    with quiet():
        found = _of_folder(question, data)
        task, source = found if isinstance(found, tuple) else _of_hub(question, found)
        task.set_config(key="num_fewshot", value=question.shots)
        documents = len(task.eval_docs)
        places = tuple(drawn(range(documents), problems, int))
        return Loaded(task, question, places, documents, source, _hash(task, places))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep remarks of lm-eval and datasets that are no errors out of the log."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _of_folder(question: Question, data: Path | None) -> "tuple[ConfigurableTask, str] | str":
    """Return the task over the documents of the data folder and their file, or the file that is not there."""
    folder = data_folder(data)
    if folder is None or question.read is None:
        return ""
    wanted = folder / "benchmarks" / question.file
    packed = (wanted, *(wanted.with_name(f"{wanted.name}{end}") for end in (".gz", ".bz2")))
    path = next((one for one in packed if one.is_file()), None)
    if path is None:
        return str(wanted)
    import datasets
    from lm_eval.api.task import ConfigurableTask

    try:
        documents = list(question.read(read_bytes(path).decode()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path} has no documents of {question.name}: {error!r}") from error
    if not documents:
        raise CorpusError(f"{path} has no documents of {question.name}: it is empty")

    def dataset(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_list(documents)}

    config = _own_settings(question.own_settings) if question.own_settings else question.config
    config = {**config, "task": question.name, "custom_dataset": dataset, "test_split": "test"}
    return ConfigurableTask(config=config), f"{path.parent.name}/{path.name} of the data folder"


def _own_settings(file: str) -> dict[str, Any]:
    """Return the settings of a task of lm-eval, less those of where its documents are."""
    import lm_eval.tasks

    settings = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / file).read_text(encoding="utf-8"))
    return {key: value for key, value in settings.items() if key not in ("dataset_path", "dataset_name", "tag")}


def _of_hub(question: Question, tried: str) -> "tuple[ConfigurableTask, str]":
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
    return task, f"hub: {task.config.dataset_path}"


@functools.cache
def _manager() -> Any:
    """Return what finds lm-eval's tasks: it reads thousands of files for that."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _hash(task: "ConfigurableTask", places: tuple[int, ...]) -> str:
    """Return a SHA-256 of all that is asked, of the right answers, and of how answers are read."""
    settings = {key: task.config.to_dict().get(key) for key in ("output_type", "metric_list", "filter_list")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for request in built(task, places):
        asked = [request.arguments, task.doc_to_target(request.doc)]
        digest.update(json.dumps(asked, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
