"""The search for the sparsity or the bits at which a sub-model keeps a quality: derive, measure, propose, and so on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.checkpoint.format import INTEGER_BITS
from secateur.config import DEFAULT_GROUP_SIZES, FOUR_BITS, EmbeddingValues, Recipe, Values
from secateur.errors import ConfigError
from secateur.pruning.budgets import EIGHT_BITS_FIRST, GROWTH
from secateur.pruning.quality import Judge, allowed_loss, kept
from secateur.pruning.size import HIGHEST, MOST_EIGHT_BITS, Footprint
from secateur.pruning.trials import Trial, Trials, best_of, searched

_FIRST, _PRECISION, _LONGEST_STEP = 0.5, 0.02, 0.25
_WORTHWHILE = 0.03  # what a bitmask has to save beyond its own size, in shares of the weights
# Of the loss that is allowed: what is aimed at, so that the next trial is more often good than not.
_AIM = 0.97
_LEAST_LOSS = 1e-4  # in nats; what is less is noise, and has no logarithm
# Where the values are left open: from the smallest, to which pruning then adds, to those that lose nothing.
_KINDS: tuple[Values, ...] = ("nl4", "int8")
_NEAR = 0.05  # of the share of weights with eight bits: how near to the least that is good


def propose(trials: Sequence[Trial], values: Values, allowed: float) -> float | None:
    """Return the sparsity to try next, or None when the trials, all of these values, have said all.

    The logarithm of the loss grows by GROWTH from sparsity 0 to 1, which leads from the first trial to the next;
    between a trial that is good and one that is not, it is interpolated. A sparsity at which the bitmask takes as
    much as the weights that it saves is no better than none.
    """
    if not trials:
        return _FIRST
    good = best_of(trials, allowed)
    bad = min((trial for trial in trials if trial.loss > allowed), key=lambda trial: trial.sparsity, default=None)
    aim = math.log(max(_AIM * allowed, _LEAST_LOSS))
    if good is not None and bad is not None:
        found = _between(good, bad, aim)
    elif good is not None:
        found = _further(good, aim, len(trials), good=True)
    else:
        found = _further(min(trials, key=lambda trial: trial.sparsity), aim, len(trials), good=False)
    if found is not None and found < 1 / INTEGER_BITS.get(values, 16) + _WORTHWHILE:
        found = 0.0 if good is None else None
    if found is None or any(trial.sparsity == found for trial in trials):
        return None
    return found


def _further(known: Trial, aim: float, tried: int, *, good: bool) -> float | None:
    """Return a sparsity above that of the best good trial or below that of the lowest bad one, where all are alike.

    Steps become longer with the number of trials: the loss then does not grow as it was taken to, as where most of it
    comes from rounding. A trial that loses nearly what is allowed is as good as any.
    """
    step = (aim - _logarithm(known)) / GROWTH
    if good:
        if known.sparsity >= HIGHEST or step <= 0:
            return None
        return round(min(known.sparsity + min(tried * max(step, _PRECISION), _LONGEST_STEP), HIGHEST), 4)
    step = max(tried * min(step, -_PRECISION / 2), -_LONGEST_STEP)
    return None if known.sparsity == 0 else round(max(known.sparsity + step, 0.0), 4)


def _between(good: Trial, bad: Trial, aim: float) -> float | None:
    """Return a sparsity above that of `good` and below that of `bad`, where the logarithm of the loss may be `aim`."""
    gap, rise = bad.sparsity - good.sparsity, _logarithm(bad) - _logarithm(good)
    if gap <= _PRECISION:
        return None
    share = (aim - _logarithm(good)) / rise if rise > 0 else 0.5
    return round(good.sparsity + min(max(share, 0.2), 0.8) * gap, 4)


def propose_eight_bits(trials: Sequence[Trial], allowed: float) -> float | None:
    """Return the share of weights to give eight bits next, or None when the trials have said all.

    None of them removes anything. A share s is taken to leave (1 - s)^EIGHT_BITS_FIRST of what four bits lose. Where
    that was too hopeful, steps become longer with the number of trials.
    """
    bad = max((one for one in trials if one.loss > allowed), key=lambda trial: trial.eight_bits, default=None)
    if bad is None:
        return None
    good = best_of(trials, allowed)
    highest = MOST_EIGHT_BITS if good is None else good.eight_bits
    gap = highest - bad.eight_bits
    if gap <= (0 if good is None else _NEAR):
        return None
    left: float = (max(_AIM * allowed, _LEAST_LOSS) / bad.loss) ** (1 / EIGHT_BITS_FIRST)
    wish = (1 - bad.eight_bits) * (1 - left)
    least, most = (min(len(trials) * _NEAR, gap), gap) if good is None else (0.2 * gap, 0.8 * gap)
    return round(bad.eight_bits + min(max(wish, least), most), 4)


def _logarithm(trial: Trial) -> float:
    return math.log(max(trial.loss, _LEAST_LOSS))


def small_embedding_pays(lost: float, allowed: float, saved: int, footprint: Footprint, values: Values) -> bool:
    """Return whether an embedding of four bits saves more bytes than pruning does with what it loses.

    Of an allowed loss L pruning can have L - lost then, which is ln(L / (L - lost)) / GROWTH less sparsity.
    """
    if lost >= allowed:
        return False
    entries = sum(shape.numel() for shape, _ in footprint.pruned)
    given_up = math.log(allowed / (allowed - max(lost, 0.0))) / GROWTH
    return saved > given_up * entries * INTEGER_BITS[values] / 8


@dataclass(frozen=True)
class Search:
    """The search for the smallest sub-model that keeps a quality: pruned, or with as few weights in eight bits.

    Attributes
    ----------
    trials
        Where they go, and those that are done already.
    recipe
        Its values are tried, or one kind after the other where it leaves them open.
    quality
        The share of the parent's that is to be kept.
    judge, footprint
        Of the base model.
    derive
        Derives a recipe, whose sparsity and values are settled, into a folder; goes on with what is there.
    say
        Called with a line on each trial.
    """

    trials: Trials
    recipe: Recipe
    quality: float
    judge: Judge
    footprint: Footprint
    derive: Callable[[Recipe, Path], None]
    say: Callable[[str], None]

    def run(self) -> Trial:
        """Derive and measure until it is there; return the best trial, whose folder is in that of the trials.

        Raises
        ------
        ConfigError
            When not even values without pruning keep so much.
        """
        if self.trials.nats is None:
            self.trials.nats = self.judge.parent()
            self.trials.save()
        nats = self.trials.nats
        allowed = allowed_loss(nats, self.quality)
        for values in _KINDS if "values" in searched(self.recipe) else (self.recipe.values,):
            for embedding in self._embeddings(values, nats, allowed):
                if (best := self._best(values, embedding, nats, allowed)) is not None:
                    return best
            if (best := self._mixed(values, embedding, nats, allowed)) is not None:
                return best
        self.trials.keep_only(None)
        most = min(self.trials.done, key=lambda trial: trial.loss)
        raise ConfigError(
            f"a quality of {self.quality} cannot be kept: {_described(most)} "
            f"keeps {kept(nats, most.loss):.4f}; ask for less with --resume, which uses what was measured, "
            f"or delete {str(self.trials.folder)!r}"
        )

    def _embeddings(self, values: Values, nats: float, allowed: float) -> tuple[EmbeddingValues, ...]:
        """Return the values of embedding and head to try beside some of the weights, one after the other."""
        recipe, trials = self.recipe, self.trials
        if "embedding_values" in recipe.model_fields_set or values == "base":
            return (recipe.embedding_values,)
        if trials.small_embedding is None:
            trials.small_embedding = self.judge.small_embedding() - nats
            trials.save()
        kinds: tuple[EmbeddingValues, ...] = ("nl4", "int8")
        small, large = (
            self.footprint.outer(recipe.model_copy(update={"values": values, "embedding_values": one})) for one in kinds
        )
        pays = small_embedding_pays(trials.small_embedding, allowed, large - small, self.footprint, values)
        return kinds if pays else kinds[1:]

    def _best(self, values: Values, embedding: EmbeddingValues, nats: float, allowed: float) -> Trial | None:
        """Try sparsities with these values until there is nothing to gain; return the best trial that is good."""

        def next_of(done: list[Trial]) -> Trial | None:
            sparsity = propose(done, values, allowed)
            return None if sparsity is None else Trial(values, sparsity, 0.0, embedding)

        return self._settled(lambda: self.trials.of(values, embedding), next_of, nats, allowed)

    def _mixed(self, values: Values, embedding: EmbeddingValues, nats: float, allowed: float) -> Trial | None:
        """Try eight bits for some of the weights where four lose too much with nothing removed, as `_best` does."""
        if values not in FOUR_BITS or "eight_bits" not in searched(self.recipe):
            return None

        def next_of(done: list[Trial]) -> Trial | None:
            share = propose_eight_bits(done, allowed)
            return None if share is None else Trial(values, 0.0, 0.0, embedding, share)

        return self._settled(lambda: self.trials.unpruned(values, embedding), next_of, nats, allowed)

    def _settled(
        self,
        done: Callable[[], list[Trial]],
        next_of: Callable[[list[Trial]], Trial | None],
        nats: float,
        allowed: float,
    ) -> Trial | None:
        """Try what follows from what is done until nothing does; return the best good trial, whose folder is there."""
        while (trial := next_of(done())) is not None:
            self._try(trial, nats)
            self.trials.keep_only(best_of(done(), allowed))
        best = best_of(done(), allowed)
        if best is not None and not self.trials.place_of(best).exists():  # measured for another quality, and deleted
            self._derived(best)
        return best

    def _try(self, trial: Trial, nats: float) -> None:
        """Derive and measure; what the trial says of its loss does not count."""
        loss = self.judge.submodel(self._derived(trial)) - nats
        self.trials.done.append(replace(trial, loss=loss))
        self.trials.save()
        self.say(f"{_described(trial)} keeps {kept(nats, loss):.4f}; {self.quality} is wanted")

    def _derived(self, trial: Trial) -> Path:
        is_open = "values" in searched(self.recipe)
        update = {
            "values": trial.values,
            "group_size": DEFAULT_GROUP_SIZES.get(trial.values) if is_open else self.recipe.group_size,
            "embedding_values": trial.embedding,
            "sparsity": trial.sparsity,
            **({"eight_bits": trial.eight_bits} if "eight_bits" in searched(self.recipe) else {}),
        }
        place = self.trials.place_of(trial)
        self.derive(self.recipe.model_copy(update=update), place)
        return place


def _described(trial: Trial) -> str:
    beside = "" if trial.values == "base" else f", embedding {trial.embedding},"
    how = f"{trial.eight_bits:.1%} in eight bits" if trial.eight_bits else f"{trial.sparsity:.1%} removed"
    return f"{trial.values}{beside} with {how}"
