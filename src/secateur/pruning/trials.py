"""The folder `OUT.search/` with the trials of a search for a quality, until the best of them becomes OUT.

Only what the search itself has put there is ever deleted.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from secateur.checkpoint.format import LOCK, LOG, MANIFEST, dump_json, read_json
from secateur.config import EmbeddingValues, Recipe, Values
from secateur.errors import CheckpointError, ConfigError, OutputError
from secateur.files import atomic_write_bytes, remove_empty
from secateur.pruning.quality import allowed_loss
from secateur.pruning.workspace import check_output, first_difference, locked

TRIALS = "trials.json"
_OWN = re.compile(
    rf"(base|int8|int4|nl4)(-int8|-int4|-nl4)?-\d\.\d{{4}}(-\d\.\d{{4}})?(\.partial|\.deleted)?"
    rf"|({re.escape(TRIALS)}|{re.escape(LOCK)})(\.partial-.*)?"
)


@dataclass(frozen=True)
class Trial:
    """One sub-model that was measured.

    Attributes
    ----------
    values, sparsity
        What it was derived with.
    loss
        Nats per token that it loses beside its parent; below 0 when it is better.
    embedding
        The values of embedding and head where they are integers.
    eight_bits
        The share of the weights that had eight bits where the others had four.
    """

    values: Values
    sparsity: float
    loss: float
    embedding: EmbeddingValues = "int8"
    eight_bits: float = 0.0


class Trials:
    """The trials of one search, in a folder that is locked for this process.

    Attributes
    ----------
    output, folder
        What the best trial becomes, and where trials are.
    nats
        Those per token of the parent; None until they are measured.
    small_embedding
        Nats per token that the parent loses when embedding and head have four bits; None until they are measured.
    done
        What was measured, in order.
    """

    def __init__(self, output: Path, asked: dict[str, Any]) -> None:
        self.output, self.folder = output, search_folder(output)
        self.nats: float | None = None
        self.small_embedding: float | None = None
        self.done: list[Trial] = []
        self._asked = asked
        for path in self.folder.glob("*.deleted"):
            _remove(path)
        if (self.folder / TRIALS).is_file():
            self._take_up()

    def _take_up(self) -> None:
        try:
            content = read_json(self.folder / TRIALS)
            self.nats = float(content["nats"])
            lost = content.get("small_embedding")
            self.small_embedding = None if lost is None else float(lost)
            self.done = [Trial(**one) for one in content["trials"]]
            # What an earlier version did not know is as open as it is now, and no other option is.
            opened = {key: None for key, one in self._asked["recipe"].items() if one is None}
            asked = content["asked"] | {"recipe": opened | content["asked"]["recipe"]}
            difference = first_difference(asked, self._asked, self._asked)
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(f"{str(self.folder / TRIALS)!r} is damaged: delete the folder to start afresh") from None
        if difference:
            raise ConfigError(
                f"{str(self.folder)!r} was begun with another {difference}: use the same options to resume (only the "
                "quality may be another), or delete the folder to start afresh"
            )

    def save(self) -> None:
        """Write down what was measured."""
        measured = {"nats": self.nats, "small_embedding": self.small_embedding}
        content = {"asked": self._asked, **measured, "trials": [asdict(one) for one in self.done]}
        atomic_write_bytes(self.folder / TRIALS, dump_json(content))

    def of(self, values: Values, embedding: EmbeddingValues) -> list[Trial]:
        """Return the trials of this kind, all of whose weights have the same bits."""
        return [one for one in self.done if (one.values, one.embedding, one.eight_bits) == (values, embedding, 0)]

    def unpruned(self, values: Values, embedding: EmbeddingValues) -> list[Trial]:
        """Return the trials of this kind that remove nothing, whatever share of the weights has eight bits."""
        return [one for one in self.done if (one.values, one.embedding, one.sparsity) == (values, embedding, 0)]

    def place_of(self, trial: Trial) -> Path:
        """Return the folder of a trial, whatever it loses."""
        share = f"-{trial.eight_bits:.4f}" if trial.eight_bits else ""
        return self.folder / f"{trial.values}-{trial.embedding}-{trial.sparsity:.4f}{share}"

    def keep_only(self, best: Trial | None) -> None:
        """Delete the folders of all other trials."""
        for trial in self.done:
            if trial != best:
                _remove(self.place_of(trial))

    def publish(self, trial: Trial) -> dict[str, Any]:
        """Move a trial to its place, delete all else, and return the log, which now tells of all trials."""
        place = self.place_of(trial)
        if self.output.exists():
            raise OutputError(
                f"output {str(self.output)!r} appeared while it was searched for; the result is in {str(place)!r}"
            )
        trials = [asdict(one) for one in self.done]
        measured = {"parent_nats": self.nats, "small_embedding": self.small_embedding, "trials": trials}
        log = read_json(place / LOG) | {"keep_quality": measured}
        atomic_write_bytes(place / LOG, dump_json(log))
        place.rename(self.output)
        clear(self.folder)
        return log


def _remove(path: Path) -> None:
    """Delete a file, or a folder that from the first moment on cannot be taken for a finished one."""
    if path.is_dir():
        doomed = path if path.suffix == ".deleted" else path.rename(path.with_name(f"{path.name}.deleted"))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Delete everything that a search has put into its folder, and the folder if nothing is left."""
    if not folder.is_dir():
        return
    own = [path for path in folder.iterdir() if _OWN.fullmatch(path.name)]
    for path in sorted(own, key=lambda path: path.name == TRIALS):  # last, because it tells whose folder it is
        _remove(path)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def open_trials(output: Path, asked: dict[str, Any], *, resume: bool) -> Iterator[Trials]:
    """Create or take up `OUT.search` for trials of what is `asked`, plain JSON.

    Raises
    ------
    OutputError
        When the output or its folder of trials exists and is not to be resumed, holds something else, or is in use.
    ConfigError
        When the search was begun with other options, or is damaged.
    """
    check_output(output, resume=resume)
    check_search(output, resume=resume)
    folder = search_folder(output)
    with locked(folder, output) as created:
        trials = Trials(output, asked)
        try:
            yield trials
        except Exception:
            if not trials.done and not any(path.is_dir() for path in folder.iterdir()):  # nothing to go on with
                clear(folder)
                remove_empty(created)
            raise


def check_kept(finished: Path, recipe: Recipe, quality: float) -> Recipe:
    """Return the recipe with what a finished search has found; raises `OutputError` when `finished` is none of it."""
    try:
        log, found = read_json(finished / LOG)["keep_quality"], read_json(finished / MANIFEST)["recipe"]
        allowed = allowed_loss(log["parent_nats"], quality)
        eight_bits = found.setdefault("eight_bits", 0.0)  # which recipes did not have at first
        trial = Trial(found["values"], found["sparsity"], allowed, found["embedding_values"], eight_bits)
        done = [Trial(**one) for one in log["trials"]]
        kept = any(replace(one, loss=allowed) == trial and one.loss <= allowed for one in done)
        recipe = recipe.model_copy(update={key: found[key] for key in searched(recipe)})
    except (CheckpointError, KeyError, TypeError):
        kept = False
    if not kept:
        raise OutputError(f"output {str(finished)!r} exists, and no search for this quality made it: name another one")
    return recipe


def best_of(trials: Sequence[Trial], allowed: float) -> Trial | None:
    """Return the trial that loses no more than is allowed with the highest sparsity, and the fewest bits."""
    good = (one for one in trials if one.loss <= allowed)
    return max(good, key=lambda trial: (trial.sparsity, -trial.eight_bits), default=None)


def searched(recipe: Recipe) -> tuple[str, ...]:
    """Return the options of a recipe that a search settles: the sparsity, and those that it leaves open."""
    given = recipe.model_fields_set
    values = () if "values" in given else ("values", "group_size")
    eight_bits = () if "eight_bits" in given else ("eight_bits",)
    return ("sparsity", *eight_bits, *values, *(() if "embedding_values" in given else ("embedding_values",)))


def search_folder(output: Path) -> Path:
    """Return the folder in which trials for `output` are kept."""
    return output.with_name(f"{output.name}.search")


def check_search(output: Path, *, resume: bool) -> None:
    """Raise `OutputError` for an interrupted search that is not to be resumed, and for what is none."""
    folder = search_folder(output)
    if not folder.exists():
        return
    if not folder.is_dir() or not (
        (folder / TRIALS).is_file() or all(_OWN.fullmatch(p.name) for p in folder.iterdir())
    ):
        raise OutputError(f"{str(folder)!r} is no interrupted search: name another output or move it")
    if not resume:
        raise OutputError(
            f"{str(folder)!r} holds an interrupted search for a quality: add --resume to go on with it, or "
            "delete it to start afresh"
        )
