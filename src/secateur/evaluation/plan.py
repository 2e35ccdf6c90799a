"""What an evaluation will do, worked out in full before the first model is opened.

Every name, option and piece of text is looked at here, so that a mistake costs seconds and not the hours after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import ConfigError, CorpusError, ModelError, OutputError, SecateurError
from secateur.evaluation.tasks import Task, parse_task
from secateur.files import check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from secateur.calibration.documents import Provenance
    from secateur.calibration.held_out import Window
    from secateur.models.source import ModelFolder

WINDOW_LENGTH = 512
WINDOWS_PER_DOCUMENT = 2


@dataclass(frozen=True)
class Subject:
    """A model to be measured: its name, its folder, and for each task its windows or why there are none."""

    name: str
    folder: "ModelFolder"
    text: dict[str, "list[Window] | str"]


@dataclass(frozen=True)
class Plan:
    """Everything that is to be measured.

    Attributes
    ----------
    tasks, subjects
        In the order of the rows and columns of the result.
    against
        Name of the subject that the others are compared with, or None.
    corpora
        Sources of the text of each task; empty where there is none.
    window_length
        Tokens in a window, at most: what the smallest of the models can take, up to 512. Counted by the tokenizer that
        the text was drawn with; others may need more.
    """

    tasks: tuple[Task, ...]
    subjects: tuple[Subject, ...]
    against: str | None
    corpora: "dict[str, tuple[Provenance, ...]]"
    window_length: int


def make_plan(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    *,
    against: str | Path | None,
    limit: int,
    data: Path | None,
    skip_missing: bool,
) -> Plan:
    """Resolve every name and tokenise every text; parameters and errors are those of `evaluate`."""
    from secateur.models.source import load_tokenizer

    parsed = _parse_tasks(tasks)
    folders, against_name = _resolve(models, against)
    positions = {name: _positions(folder) for name, folder in folders.items()}
    with_text = [task for task in parsed if not task.has_answers]
    corpora, missing = _find_corpora(with_text, data, skip_missing)

    tokenizers = {name: load_tokenizer(folder) for name, folder in folders.items()}
    drawn = [task for task in with_text if task.name not in missing]
    length = min([WINDOW_LENGTH, *positions.values()])
    text = _draw(drawn, tokenizers, against_name, limit, length, data)
    while (longest := _longest_beyond(text, positions)) is not None:
        if length == 2:
            raise ConfigError(
                f"{longest[0]} takes {positions[longest[0]]} tokens, too few for two of the others' tokens"
            )
        length = max(2, min(length - 1, length * positions[longest[0]] // longest[1]))
        text = _draw(drawn, tokenizers, against_name, limit, length, data)
    subjects = [Subject(name, folder, {**missing, **text[name]}) for name, folder in folders.items()]
    return Plan(tuple(parsed), tuple(subjects), against_name, corpora, length)


def _draw(  # noqa: PLR0917
    tasks: Sequence[Task],
    tokenizers: "Mapping[str, PreTrainedTokenizerBase]",
    against: str | None,
    limit: int,
    length: int,
    data: Path | None,
) -> "dict[str, dict[str, list[Window] | str]]":
    """Return the windows of each model and task: the same text for all, drawn in the tokens of the one to compare with.

    Without one it is the first model's tokenizer that decides where windows end.
    """
    from secateur.calibration.held_out import held_out_windows, in_other_tokens

    reference = tokenizers[against if against is not None else next(iter(tokenizers))]
    options = {"max_tokens": limit, "window_length": length, "windows_per_document": WINDOWS_PER_DOCUMENT}
    drawn = {task.name: held_out_windows(task.domain, reference, data=data, **options) for task in tasks}
    return {
        name: {task: in_other_tokens(windows, tokenizer) for task, windows in drawn.items()}
        for name, tokenizer in tokenizers.items()
    }


def _longest_beyond(
    text: "Mapping[str, Mapping[str, list[Window] | str]]", positions: Mapping[str, int]
) -> tuple[str, int] | None:
    """Return a model and the tokens of a window that are more than it takes; None where all are taken."""
    for name, by_task in text.items():
        lengths = [len(one.token_ids) for windows in by_task.values() for one in windows if not isinstance(one, str)]
        if max(lengths, default=0) > positions[name]:
            return name, max(lengths)
    return None


def check_arguments(models: Sequence[str | Path], tasks: Sequence[str], limit: int, output: Path | None) -> None:
    """Refuse arguments that no look at the disk for models or text could mend."""
    if isinstance(models, str | Path) or isinstance(tasks, str):
        raise ConfigError("models and tasks are lists; put a single name into one")
    if not models or not tasks:
        raise ConfigError("nothing to evaluate: name at least one model and one task, such as perplexity:python")
    parsed = _parse_tasks(tasks)
    if output is None and any(task.has_answers for task in parsed):
        raise ConfigError("answers of models are kept: name a folder for them with -o")
    if limit < 2:
        raise ConfigError(f"the limit is {limit} tokens; at least 2 are needed to predict one")
    if output is not None and (output.exists() or output.is_symlink()):
        raise OutputError(f"output {str(output)!r} exists; name another folder or remove it")
    if output is not None:
        check_writable(output)


def _parse_tasks(tasks: Sequence[str]) -> list[Task]:
    from secateur.calibration.corpora import DOMAINS

    return [parse_task(name, DOMAINS.names()) for name in dict.fromkeys(tasks)]


def _resolve(models: Sequence[str | Path], against: str | Path | None) -> "tuple[dict[str, ModelFolder], str | None]":
    """Return folders by the users' names, each folder once, and the name of the one to compare with."""
    from secateur.models.source import resolve_model

    folders: dict[str, ModelFolder] = {}
    names: dict[Path, str] = {}
    for name in models:
        folder = resolve_model(str(name))
        if folder.path not in names:
            names[folder.path] = str(name)
            folders[str(name)] = folder
    if against is None:
        return folders, None
    parent = resolve_model(str(against))
    if parent.path in names:
        return folders, names[parent.path]
    return {str(against): parent, **folders}, str(against)


def _positions(folder: "ModelFolder") -> int:
    from transformers import AutoConfig

    from secateur.models.source import first_line

    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False).get_text_config()
    except SecateurError:
        raise
    except Exception as error:  # transformers raises what it likes on a config that it does not know
        raise ModelError(
            f"model {folder.name!r} is none that transformers knows ({first_line(error)}); name another one"
        ) from error
    return int(getattr(config, "max_position_embeddings", None) or WINDOW_LENGTH)


def _find_corpora(
    tasks: list[Task], data: Path | None, skip_missing: bool
) -> "tuple[dict[str, tuple[Provenance, ...]], dict[str, str]]":
    """Return, by task, where its text comes from, or else why there is none."""
    from secateur.calibration.corpora import load_corpus
    from secateur.calibration.documents import HELD_OUT

    found: dict[str, tuple[Provenance, ...]] = {}
    missing: dict[str, str] = {}
    for task in tasks:
        try:
            found[task.name] = load_corpus(task.domain, HELD_OUT, data).provenance
        except CorpusError as error:
            if not skip_missing:
                raise
            found[task.name] = ()
            missing[task.name] = str(error)
    return found, missing
