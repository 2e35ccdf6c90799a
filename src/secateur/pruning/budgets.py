"""Budgets: how the sparsity that was asked for is shared over the prunable weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.registry import Registry

# By the names of the weights that make a part: nats per token that the model loses when this part alone is pruned.
Divergence = Mapping[tuple[str, ...], float]
Shapes = Mapping[str, tuple[int, int]]  # [out_features, in_features] of each prunable weight, by name
Size = Callable[[tuple[int, int], float], int]  # bytes of a weight of some shape that loses a share of its entries
BudgetFunction = Callable[[Shapes, float, Divergence, Size], dict[str, float]]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
BudgetNeeds = Literal["nothing", "divergence"]

# Of the logarithm of a part's divergence, by its sparsity: measured between 50% and 60% (docs/results/methods.md).
GROWTH = 6.0
# Of what four bits lose where a share s of the weights has eight, those that lose most, (1 - s)^this is taken as left:
# 0.8 (Qwen2.5-Coder-0.5B) to 1.8 (SmolLM2-135M) were measured (docs/results/bits.md).
EIGHT_BITS_FIRST = 1.5
_NOTHING = 1e-12  # of a divergence in nats: far below what float32 probabilities can tell
REACH = 0.2  # how far from the sparsity that was asked for a part may go
_STEP = 0.0025  # between the sparsities that `packed` tries


@dataclass(frozen=True)
class Budget:
    """A registered budget: its function, what that needs to know, and one line on what it does."""

    name: str
    function: BudgetFunction
    needs: BudgetNeeds
    summary: str


BUDGETS: Registry[Budget] = Registry("budget")


def register(name: str, *, needs: BudgetNeeds = "nothing") -> Callable[[BudgetFunction], BudgetFunction]:
    """Register a budget; the first line of its docstring is what `secateur list budgets` shows.

    Its function takes the shapes of the prunable weights, the sparsity of the whole, if it `needs` that the divergence
    of each part of the model, else an empty mapping, and the bytes of a weight. It returns the sparsity by name.
    """

    def add(function: BudgetFunction) -> BudgetFunction:
        BUDGETS.add(name, Budget(name, function, needs, (function.__doc__ or "").strip().splitlines()[0]))
        return function

    return add


@register("uniform")
def uniform(shapes: Shapes, sparsity: float, _: Divergence, __: Size) -> dict[str, float]:
    """Give every prunable weight the same sparsity."""
    return dict.fromkeys(shapes, sparsity)


@register("measured", needs="divergence")
def measured(shapes: Shapes, sparsity: float, divergence: Divergence, __: Size) -> dict[str, float]:
    """Remove less where the model loses more by it, as measured for the attention and the MLP of each block.

    The divergence of part p is taken to be d_p * exp(GROWTH * (s_p - sparsity)). The sum of all is least where one
    more weight removed costs the same in each: s_p = sparsity + ln(entries_p / d_p) / GROWTH + a constant, as far as
    REACH allows. The constant is the lowest with which no fewer weights are removed than uniformly.
    """
    largest = max(divergence.values(), default=0.0)
    if sparsity == 0 or largest < _NOTHING:
        return dict.fromkeys(shapes, sparsity)
    wishes: dict[str, float] = {}
    for names, lost in divergence.items():
        entries = sum(math.prod(shapes[name]) for name in names)
        wish = math.log(entries / max(lost, 1e-6 * largest)) / GROWTH
        wishes |= dict.fromkeys(names, wish)
    lowest, highest = _reach(sparsity)

    def shared(constant: float) -> dict[str, float]:
        return {name: round(min(highest, max(lowest, wishes[name] + constant)), 4) for name in shapes}

    wanted = _removed(shapes, dict.fromkeys(shapes, sparsity))
    low, high = lowest - max(wishes.values()), highest - min(wishes.values())  # all at the lowest; all at the highest
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _removed(shapes, shared(middle)) < wanted else (low, middle)
    return shared(high)


@register("packed", needs="divergence")
def packed(shapes: Shapes, sparsity: float, divergence: Divergence, size: Size) -> dict[str, float]:
    """Spend the bytes that the sparsity leaves where they serve most; what loses much by it may keep all its entries.

    With integers a weight that loses nothing needs no bitmask, so that removing a few entries saves nothing at all. The
    divergence of a part is taken to grow as for `measured`, and the sum of all is made small by bytes: each part has
    the sparsity, or none, at which what it loses and a price for its bytes are least together. The price is the lowest
    with which all bytes are enough; it is found again for those that are pruned when it is settled which are whole.
    """
    largest = max(divergence.values(), default=0.0)
    if sparsity == 0 or largest < _NOTHING:
        return dict.fromkeys(shapes, sparsity)
    lowest, highest = _reach(sparsity)
    tried = np.array([0.0, *np.arange(lowest, highest, _STEP), highest]).round(4)  # the first: to be whole
    taken = np.array([[sum(size(shapes[name], one) for name in names) for one in tried] for names in divergence])
    growth = np.exp(GROWTH * (tried - sparsity))
    # Where a weight has a bitmask anyway, to be whole is only the sparsity of 0, which is out of reach.
    needs_no_bitmask = all(size(shape, 0.0) < size(shape, _STEP) for shape in shapes.values())
    growth[0] = 0.0 if needs_no_bitmask else np.inf
    lost = np.array([max(one, 1e-6 * largest) * growth for one in divergence.values()])
    allowed = sum(size(shape, sparsity) for shape in shapes.values())
    is_whole = _least_loss(lost, taken, allowed) == 0
    lost[is_whole, 1:], lost[~is_whole, 0] = np.inf, np.inf
    found = tried[_least_loss(lost, taken, allowed)].tolist()
    return {name: one for names, one in zip(divergence, found, strict=True) for name in names}


def _least_loss(lost: FloatArray, taken: IntArray, allowed: int) -> IntArray:
    """Return for each part the index of a choice, so that all take no more bytes than allowed and lose little.

    `lost` and `taken` are [parts, choices]; the choices that take least are few enough bytes.
    """
    parts = np.arange(len(lost))

    def chosen(log_price: float) -> IntArray:
        found: IntArray = (lost + math.exp(log_price) * taken).argmin(axis=1)
        return found

    low, high = -60.0, 60.0  # of the logarithm of a price in nats for each byte
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if taken[parts, chosen(middle)].sum() <= allowed else (middle, high)
    best, better = chosen(high), chosen(low)
    for part in np.flatnonzero(best != better):  # parts that are alike change together, and not all need to
        with_it = np.where(parts == part, better, best)
        best = with_it if taken[parts, with_it].sum() <= allowed else best
    return best


def worth_most(divergence: Divergence, more: Mapping[str, int], share: float) -> frozenset[str]:
    """Return the weights to be rounded less: those of the parts that lose most for each byte that it takes.

    Of a part for which there are too few bytes left, the smallest weights are; it is not known which of them lose most.

    Parameters
    ----------
    divergence
        What the model loses when a part alone is rounded; it is taken to lose nothing of that when it is rounded less.
    more
        Bytes that a weight takes more then, by name.
    share
        Of all these bytes: how many there are for it.
    """
    left = share * sum(more.values())
    chosen: set[str] = set()
    taken = {names: sum(more[name] for name in names) for names in divergence}
    for names in sorted(divergence, key=lambda names: divergence[names] / taken[names], reverse=True):
        # A part that is too large may have weights that are not.
        for name in sorted(names, key=more.__getitem__) if taken[names] > left else names:
            if more[name] <= left:
                chosen.add(name)
                left -= more[name]
    return frozenset(chosen)


def least_that_pays(bits: int) -> float:
    """Return the sparsity below which it serves better to leave a part whole, and to remove more from others."""
    return 1 / GROWTH + 1 / bits


def share_that_is_pruned(sparsity: float, bits: int) -> tuple[float, float]:
    """Return (share of the weights, their sparsity) as `packed` has it where all parts lose alike."""
    least = least_that_pays(bits)
    return (1.0, sparsity) if sparsity >= least else (max(0.0, sparsity - 1 / bits) * GROWTH, least)


def _reach(sparsity: float) -> tuple[float, float]:
    return max(sparsity - REACH, sparsity / 2), min(sparsity + REACH, (1 + sparsity) / 2)


def _removed(shapes: Shapes, sparsity: Mapping[str, float]) -> int:
    """Return how many entries all weights lose, each row as many as its sparsity says."""
    return sum(rows * round(sparsity[name] * columns) for name, (rows, columns) in shapes.items())
