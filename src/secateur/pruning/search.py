"""The search for the sparsity at which a sub-model keeps a given quality: derive, measure, propose, and so on."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.checkpoint.format import INTEGER_BITS, LOG, MANIFEST, dump_json, read_json
from secateur.config import DEFAULT_GROUP_SIZES, Recipe, Values
from secateur.errors import CheckpointError, ConfigError, OutputError
from secateur.files import atomic_write_bytes
from secateur.pruning.budgets import GROWTH
from secateur.pruning.quality import Judge, allowed_loss, kept
from secateur.pruning.size import HIGHEST

TRIALS = "trials.json"
_FIRST, _PRECISION, _LONGEST_STEP = 0.5, 0.02, 0.25
_WORTHWHILE = 0.03  # what a bitmask has to save beyond its own size, in shares of the weights
# Of the loss that is allowed: what is aimed at, so that the next trial is more often good than not.
_AIM = 0.97
_LEAST_LOSS = 1e-4  # in nats; what is less is noise, and has no logarithm
# Where the values are left open: from the smallest, to which pruning then adds, to those that lose nothing.
_KINDS: tuple[Values, ...] = ("int4", "int8")


@dataclass(frozen=True)
class Trial:
    """One sub-model that was measured.

    Attributes
    ----------
    values, sparsity
        What it was derived with.
    loss
        Nats per token that it loses beside its parent; below 0 when it is better.
    """

    values: Values
    sparsity: float
    loss: float


def propose(trials: Sequence[Trial], values: Values, allowed: float) -> float | None:
    """Return the sparsity to try next, or None when the trials of these values have said all.

    The logarithm of the loss grows by GROWTH from sparsity 0 to 1, which leads from the first trial to the next;
    between a trial that is good and one that is not, it is interpolated. A sparsity at which the bitmask takes as
    much as the weights that it saves is no better than none.
    """
    mine = [trial for trial in trials if trial.values == values]
    if not mine:
        return _FIRST
    good = max((trial for trial in mine if trial.loss <= allowed), key=lambda trial: trial.sparsity, default=None)
    bad = min((trial for trial in mine if trial.loss > allowed), key=lambda trial: trial.sparsity, default=None)
    aim = math.log(max(_AIM * allowed, _LEAST_LOSS))
    if good is not None and bad is not None:
        found = _between(good, bad, aim)
    elif good is not None:
        found = _further(good, aim, len(mine), good=True)
    else:
        found = _further(min(mine, key=lambda trial: trial.sparsity), aim, len(mine), good=False)
    if found is not None and found < 1 / INTEGER_BITS.get(values, 16) + _WORTHWHILE:
        found = 0.0 if good is None else None
    if found is None or any(trial.sparsity == found for trial in mine):
        return None
    return found


def _further(known: Trial, aim: float, tried: int, *, good: bool) -> float | None:
    """Return a sparsity above that of the best good trial or below that of the lowest bad one, where all are alike.

    Steps become longer with the number of trials: the loss then does not grow as it was taken to.
    """
    step = (aim - _logarithm(known)) / GROWTH
    if good:
        reached = known.sparsity >= HIGHEST or step < _PRECISION / 2
        return None if reached else round(min(known.sparsity + min(tried * step, _LONGEST_STEP), HIGHEST), 4)
    step = max(tried * min(step, -_PRECISION / 2), -_LONGEST_STEP)
    return None if known.sparsity == 0 else round(max(known.sparsity + step, 0.0), 4)


def _between(good: Trial, bad: Trial, aim: float) -> float | None:
    """Return a sparsity above that of `good` and below that of `bad`, where the logarithm of the loss may be `aim`."""
    gap, rise = bad.sparsity - good.sparsity, _logarithm(bad) - _logarithm(good)
    if gap <= _PRECISION:
        return None
    share = (aim - _logarithm(good)) / rise if rise > 0 else 0.5
    return round(good.sparsity + min(max(share, 0.2), 0.8) * gap, 4)


def _logarithm(trial: Trial) -> float:
    return math.log(max(trial.loss, _LEAST_LOSS))


class Trials:
    """The folder `OUT.search/` with the trials of one derivation, until the best of them becomes OUT.

    Raises
    ------
    OutputError
        When an interrupted search is there that is not to be resumed.
    ConfigError
        When it was begun with other options.
    """

    def __init__(self, output: Path, recipe: Recipe, text: str, *, resume: bool) -> None:
        self.output, self.folder = output, search_folder(output)
        searched = ("sparsity", "values", "group_size") if _is_open(recipe) else ("sparsity",)
        self._asked = {key: one for key, one in recipe.to_dict().items() if key not in searched} | {"text": text}
        self.nats: float | None = None
        self.done: list[Trial] = []
        check_search(output, resume=resume)
        if (self.folder / TRIALS).is_file():
            self._take_up(read_json(self.folder / TRIALS))

    def _take_up(self, content: Mapping[str, Any]) -> None:
        try:
            self.nats = float(content["nats"])
            self.done = [Trial(**one) for one in content["trials"]]
            same = content["asked"] == self._asked
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{str(self.folder / TRIALS)!r} is damaged: delete the folder to start afresh"
            ) from None
        if not same:
            raise ConfigError(
                f"{str(self.folder)!r} was begun with other options or text: use the same to resume (only the quality "
                "may be another), or delete the folder to start afresh"
            )

    def save(self) -> None:
        """Write down what was measured."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"asked": self._asked, "nats": self.nats, "trials": [asdict(trial) for trial in self.done]}
        atomic_write_bytes(self.folder / TRIALS, dump_json(content))

    def place(self, values: Values, sparsity: float) -> Path:
        """Return the folder of a trial."""
        return self.folder / f"{values}-{sparsity:.4f}"

    def best(self, allowed: float) -> Trial | None:
        """Return the good trial whose sparsity is highest, of the first values that have one."""
        good = [trial for trial in self.done if trial.loss <= allowed]
        same = [trial for trial in good if trial.values == good[0].values]
        return max(same, key=lambda trial: trial.sparsity, default=None)

    def forget(self, allowed: float) -> None:
        """Delete the folders of all trials but the best."""
        best = self.best(allowed)
        for trial in self.done:
            if trial != best:
                shutil.rmtree(self.place(trial.values, trial.sparsity), ignore_errors=True)

    def discard_empty(self) -> None:
        """Delete the folder where nothing in it could be resumed."""
        if not self.done and not any(path.is_dir() for path in self.folder.glob("*")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, trial: Trial) -> dict[str, Any]:
        """Move a trial to its place, delete all else, and return the log, which now tells of all trials."""
        place = self.place(trial.values, trial.sparsity)
        measured = {"parent_nats": self.nats, "trials": [asdict(one) for one in self.done]}
        log = read_json(place / LOG) | {"keep_quality": measured}
        atomic_write_bytes(place / LOG, dump_json(log))
        place.rename(self.output)
        shutil.rmtree(self.folder)
        return log


def _is_open(recipe: Recipe) -> bool:
    """Return whether a recipe leaves it open which values are stored."""
    return "values" not in recipe.model_fields_set


def settled(recipe: Recipe, finished: Path) -> Recipe:
    """Return a recipe with the sparsity and values of a finished sub-model, if it is one."""
    try:
        found = read_json(finished / MANIFEST)["recipe"]
        return recipe.model_copy(update={key: found[key] for key in ("sparsity", "values", "group_size")})
    except (CheckpointError, KeyError, TypeError):
        return recipe  # which then is refused as another one


def search_folder(output: Path) -> Path:
    """Return the folder in which trials for `output` are kept."""
    return output.with_name(f"{output.name}.search")


def check_search(output: Path, *, resume: bool) -> None:
    """Raise `OutputError` for an interrupted search that is not to be resumed."""
    if search_folder(output).exists() and not resume:
        raise OutputError(
            f"{str(search_folder(output))!r} holds an interrupted search for a quality: add --resume to go on with it, "
            "or delete it to start afresh"
        )


def find_sparsity(  # noqa: PLR0917
    trials: Trials,
    recipe: Recipe,
    quality: float,
    judge: Judge,
    derive: Callable[[Recipe, Path], None],
    say: Callable[[str], None],
) -> Trial:
    """Derive and measure until the sub-model with the highest sparsity that keeps the quality is there.

    Parameters
    ----------
    trials
        Where they go, and those that are done already.
    recipe
        Its values are tried, or one kind after the other where it leaves them open.
    quality
        The share of the parent's that is to be kept.
    judge
        Of the base model.
    derive
        Derives a recipe, whose sparsity and values are settled, into a folder; goes on with what is there.
    say
        Called with a line on each trial.

    Returns
    -------
    Trial
        The best one, whose folder is in that of the trials.

    Raises
    ------
    ConfigError
        When not even values without pruning keep so much.
    """
    if trials.nats is None:
        trials.nats = judge.parent()
        trials.save()
    nats, allowed = trials.nats, allowed_loss(trials.nats, quality)

    def derived(values: Values, sparsity: float) -> Path:
        group_size = DEFAULT_GROUP_SIZES.get(values) if _is_open(recipe) else recipe.group_size
        place = trials.place(values, sparsity)
        derive(recipe.model_copy(update={"values": values, "group_size": group_size, "sparsity": sparsity}), place)
        return place

    for values in _KINDS if _is_open(recipe) else (recipe.values,):
        while (sparsity := propose(trials.done, values, allowed)) is not None:
            loss = judge.submodel(derived(values, sparsity)) - nats
            trials.done.append(Trial(values, sparsity, loss))
            trials.save()
            trials.forget(allowed)
            say(f"{values} with {sparsity:.1%} removed keeps {kept(nats, loss):.4f}; {quality} is wanted")
        if (best := trials.best(allowed)) is not None:
            derived(best.values, best.sparsity)  # again, where it was measured for another quality
            return best
    most = min(trials.done, key=lambda trial: trial.loss)
    raise ConfigError(
        f"a quality of {quality} cannot be kept: {most.values} with {most.sparsity:.1%} removed keeps "
        f"{kept(nats, most.loss):.4f}; ask for less with --resume, which uses what was measured, or delete "
        f"{str(trials.folder)!r}"
    )
