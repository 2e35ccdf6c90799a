"""What a pruning method is: a pure function from a weight and its statistics to a mask and new values, and a name.

The loop over blocks, hooks and files belong to the pipeline; a method sees one weight at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from secateur.calibration.statistics import InputStatistics
from secateur.pruning.masks import Target
from secateur.registry import Registry

# Each includes the one before. `gram`: products of all pairs of inputs; `cross_gram`: also with the parent's inputs.
Needs = Literal["nothing", "input_norms", "gram", "cross_gram"]


@dataclass(frozen=True)
class Pruned:
    """What a method returns.

    Attributes
    ----------
    weight
        [out_features, in_features], the base's precision; entries that are not kept are ignored.
    mask
        bool [out_features, in_features], True = kept.
    """

    weight: Tensor
    mask: Tensor


MethodFunction = Callable[[Tensor, InputStatistics | None, Target], Pruned]


@dataclass(frozen=True)
class Method:
    """A registered method: its function, the statistics it needs, and one line on what it does."""

    name: str
    needs: Needs
    function: MethodFunction
    summary: str

    @property
    def needs_gram(self) -> bool:
        """Whether it needs the Gram matrix of the inputs."""
        return self.needs in {"gram", "cross_gram"}


METHODS: Registry[Method] = Registry("method")


def register(name: str, *, needs: Needs) -> Callable[[MethodFunction], MethodFunction]:
    """Register a method; the first line of its docstring is what `secateur list methods` shows."""

    def add(function: MethodFunction) -> MethodFunction:
        METHODS.add(name, Method(name, needs, function, (function.__doc__ or "").strip().splitlines()[0]))
        return function

    return add
