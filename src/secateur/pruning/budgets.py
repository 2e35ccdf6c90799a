"""Budgets: how the sparsity that was asked for is shared over the prunable weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from secateur.registry import Registry

BudgetFunction = Callable[[Mapping[str, int], float], dict[str, float]]


@dataclass(frozen=True)
class Budget:
    """A registered budget: its function and one line on what it does."""

    name: str
    function: BudgetFunction
    summary: str


BUDGETS: Registry[Budget] = Registry("budget")


def register(name: str) -> Callable[[BudgetFunction], BudgetFunction]:
    """Register a budget; the first line of its docstring is what `secateur list budgets` shows."""

    def add(function: BudgetFunction) -> BudgetFunction:
        BUDGETS.add(name, Budget(name, function, (function.__doc__ or "").strip().splitlines()[0]))
        return function

    return add


@register("uniform")
def uniform(sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Give every prunable weight the same sparsity.

    sizes: number of entries by weight name. Returns the sparsity by weight name.
    """
    return dict.fromkeys(sizes, sparsity)
