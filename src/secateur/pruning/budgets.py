"""Budgets: how the sparsity that was asked for is shared over the prunable weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from secateur.registry import Registry

# By the names of the weights that make a part: nats per token that the model loses when this part alone is pruned.
Divergence = Mapping[tuple[str, ...], float]
BudgetFunction = Callable[[Mapping[str, tuple[int, int]], float, Divergence], dict[str, float]]
BudgetNeeds = Literal["nothing", "divergence"]

# Of the logarithm of a part's divergence, by its sparsity: measured between 50% and 60% (docs/results/methods.md).
GROWTH = 6.0
_NOTHING = 1e-12  # of a divergence in nats: far below what float32 probabilities can tell
REACH = 0.2  # how far from the sparsity that was asked for a part may go


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

    Its function takes [out_features, in_features] of each prunable weight by name, the sparsity of the whole, and, if
    it `needs` that, the divergence of each part of the model, else an empty mapping. It returns the sparsity by name.
    """

    def add(function: BudgetFunction) -> BudgetFunction:
        BUDGETS.add(name, Budget(name, function, needs, (function.__doc__ or "").strip().splitlines()[0]))
        return function

    return add


@register("uniform")
def uniform(shapes: Mapping[str, tuple[int, int]], sparsity: float, _: Divergence) -> dict[str, float]:
    """Give every prunable weight the same sparsity."""
    return dict.fromkeys(shapes, sparsity)


@register("measured", needs="divergence")
def measured(shapes: Mapping[str, tuple[int, int]], sparsity: float, divergence: Divergence) -> dict[str, float]:
    """Remove less where the model loses more by it, as measured for the attention and the MLP of each block.

    The divergence of part p is taken to be d_p * exp(GROWTH * (s_p - sparsity)). The sum of all is least where one
    more weight removed costs the same in each: s_p = sparsity + ln(entries_p / d_p) / GROWTH + a constant, as far as
    REACH allows. The constant is the lowest with which no fewer weights are removed than uniformly.
    """
    largest = max(divergence.values(), default=0.0)
    if sparsity == 0 or largest < _NOTHING:
        return uniform(shapes, sparsity, divergence)
    wishes: dict[str, float] = {}
    for names, lost in divergence.items():
        entries = sum(math.prod(shapes[name]) for name in names)
        wish = math.log(entries / max(lost, 1e-6 * largest)) / GROWTH
        wishes |= dict.fromkeys(names, wish)
    lowest, highest = max(sparsity - REACH, sparsity / 2), min(sparsity + REACH, (1 + sparsity) / 2)

    def shared(constant: float) -> dict[str, float]:
        return {name: round(min(highest, max(lowest, wishes[name] + constant)), 4) for name in shapes}

    wanted = _removed(shapes, uniform(shapes, sparsity, divergence))
    low, high = lowest - max(wishes.values()), highest - min(wishes.values())  # all at the lowest; all at the highest
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _removed(shapes, shared(middle)) < wanted else (low, middle)
    return shared(high)


def _removed(shapes: Mapping[str, tuple[int, int]], sparsity: Mapping[str, float]) -> int:
    """Return how many entries all weights lose, each row as many as its sparsity says."""
    return sum(rows * round(sparsity[name] * columns) for name, (rows, columns) in shapes.items())
