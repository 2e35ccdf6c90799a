"""Shares of problems that are solved: intervals, differences between two models on the same problems, and pass@k."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from secateur.evaluation.statistics import CONFIDENCE

_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True)
class Share:
    """A mean over problems with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedShare:
    """Two models on the same problems.

    Attributes
    ----------
    difference
        Mean of this model less that of the other, with a 95% interval: where each problem is either solved or not that
        of Newcombe (1998, method 10), else from resampled problems.
    kept
        This model's mean over the other's, with that of Donner & Zou (2012) or likewise; None where the other solves
        nothing.
    p_value
        Of McNemar's exact test, where each problem is either solved or not; else of a sign-flip test.
    """

    difference: Share
    kept: Share | None
    p_value: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the chance that one of k samples is correct, given how many of some were (Chen et al. 2021, eq. 1).

    Raises `ValueError` with fewer samples than k.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be told from {samples} samples of which {correct} are correct")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / number for number in range(samples - correct + 1, samples + 1))


def wilson(solved: int, count: int) -> Share:
    """Return a share of problems that are solved or not, with Wilson's score interval (Wilson 1927)."""
    if not 0 <= solved <= count or count < 1:
        raise ValueError(f"{solved} of {count} is no share")
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    value = solved / count
    centre = (value + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    return Share(value, max(0.0, centre - reach), min(1.0, centre + reach))


def mean_share(values: ArrayLike) -> Share:
    """Return the mean of shares [problems]: Wilson's interval where each is 0 or 1, else by resampling problems."""
    shares = np.asarray(values, np.float64)
    if bool(np.isin(shares, (0.0, 1.0)).all()):
        return wilson(int(shares.sum()), len(shares))
    return _resampled(shares.mean(), [shares[rows].mean() for rows in _rows(len(shares))])


def paired(values: ArrayLike, others: ArrayLike) -> PairedShare:
    """Compare shares [problems] with another model's, problem by problem."""
    ours, theirs = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise ValueError(f"the same problems are needed, not {ours.shape} beside {theirs.shape}")
    if bool(np.isin(np.concatenate([ours, theirs]), (0.0, 1.0)).all()):
        return _paired_whole(ours, theirs)
    means = np.array([(ours[rows].mean(), theirs[rows].mean()) for rows in _rows(len(ours))])
    difference = _resampled((ours - theirs).mean(), means[:, 0] - means[:, 1])
    some = means[means[:, 1] > 0]
    kept = _resampled(ours.sum() / theirs.sum(), some[:, 0] / some[:, 1]) if theirs.sum() > 0 else None
    return PairedShare(difference, kept, _sign_flips(ours - theirs))


def _paired_whole(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> PairedShare:
    """Compare problems that are solved or not: from the score intervals of both, and how alike the two are."""
    count, both = len(ours), int((ours * theirs).sum())
    one, other = int(ours.sum()), int(theirs.sum())
    first, second = wilson(one, count), wilson(other, count)
    alike = _correlation(count, both, one, other)
    down, up = first.value - first.low, first.high - first.value
    their_down, their_up = second.value - second.low, second.high - second.value
    value = (one - other) / count
    low = value - math.sqrt(down**2 - 2 * alike * down * their_up + their_up**2)
    high = value + math.sqrt(up**2 - 2 * alike * up * their_down + their_down**2)
    kept = None
    if other > 0:
        # Both ends solve a quadratic: the share r at which the interval of ours - r theirs ends at 0.
        half = first.value * second.value - alike * down * their_up
        a, c = second.high * (2 * second.value - second.high), first.low * (2 * first.value - first.low)
        least = c / (half + math.sqrt(max(0.0, half**2 - a * c))) if c > 0 else 0.0
        half = first.value * second.value - alike * up * their_down
        a, c = second.low * (2 * second.value - second.low), first.high * (2 * first.value - first.high)
        kept = Share(one / other, least, (half + math.sqrt(max(0.0, half**2 - a * c))) / a)
    return PairedShare(Share(value, low, high), kept, mcnemar(ours, theirs))


def _correlation(count: int, both: int, one: int, other: int) -> float:
    """Return the correlation of solving, towards 0 by what chance may be (Newcombe 1998)."""
    spread = one * (count - one) * other * (count - other)
    if spread == 0:
        return 0.0
    excess = both * (count - one - other + both) - (one - both) * (other - both)
    return (max(0.0, excess - count / 2) if excess > 0 else excess) / math.sqrt(spread)


def mcnemar(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of McNemar's exact test, from what only one of the two solves."""
    gained, lost = int(((ours == 1) & (theirs == 0)).sum()), int(((ours == 0) & (theirs == 1)).sum())
    count = gained + lost
    tail = sum(math.comb(count, number) for number in range(min(gained, lost) + 1)) / 2**count
    return float(min(1.0, 2 * tail))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for how many there are (Holm 1979), in their order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def _rows(count: int) -> Iterator[NDArray[np.int64]]:
    """Give the problems of each set that is drawn anew, a set at a time: all together take gigabytes of a long task."""
    chance = np.random.default_rng(_SEED)
    for _ in range(_RESAMPLES):
        yield chance.integers(0, count, count)


def _resampled(value: float, resampled: ArrayLike) -> Share:
    low, high = np.quantile(np.asarray(resampled, np.float64), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Share(float(value), float(low), float(high))


def _sign_flips(differences: NDArray[np.float64]) -> float:
    """Return how often a mean is as far from 0 when the two models of each problem are exchanged at random."""
    chance, bound = np.random.default_rng(_SEED), abs(differences.mean()) - 1e-12
    flipped = (chance.choice((-1.0, 1.0), len(differences)) * differences for _ in range(_RESAMPLES))
    as_far = sum(abs(one.mean()) >= bound for one in flipped)
    return float((as_far + 1) / (_RESAMPLES + 1))
