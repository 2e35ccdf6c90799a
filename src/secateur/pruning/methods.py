"""Pruning methods: pure functions from a weight and its statistics to the weight's mask, registered by name.

The loop over blocks, hooks and files belong to the pipeline; a method sees one weight at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.calibration.statistics import InputStatistics
from secateur.pruning.masks import Target, keep_top
from secateur.registry import Registry

Needs = Literal["nothing", "input_norms"]


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


METHODS: Registry[Method] = Registry("method")


def register(name: str, *, needs: Needs) -> Callable[[MethodFunction], MethodFunction]:
    """Register a method; the first line of its docstring is what `secateur list methods` shows."""

    def add(function: MethodFunction) -> MethodFunction:
        METHODS.add(name, Method(name, needs, function, (function.__doc__ or "").strip().splitlines()[0]))
        return function

    return add


@register("wanda", needs="input_norms")
def wanda(weight: Tensor, statistics: InputStatistics | None, target: Target) -> Pruned:
    """Keep the weights with the largest |W_ij| * ||x_j||_2 (Sun et al. 2024, eq. 1).

    Changes no weight that it keeps.
    """
    assert statistics is not None  # noqa: S101 - the pipeline gives what `needs` names
    score = weight.float().abs() * statistics.input_norms.to(weight.device)  # [out, in]; higher = keep
    return Pruned(weight, keep_top(score, target))


@register("magnitude", needs="nothing")
def magnitude(weight: Tensor, statistics: InputStatistics | None, target: Target) -> Pruned:
    """Keep the weights with the largest |W_ij|; looks at no data."""
    return Pruned(weight, keep_top(weight.float().abs(), target))


@register("random", needs="nothing")
def random(weight: Tensor, statistics: InputStatistics | None, target: Target) -> Pruned:
    """Keep weights drawn uniformly at random with the recipe's seed: the floor that a method must beat."""
    generator = torch.Generator().manual_seed(target.seed)
    return Pruned(weight, keep_top(torch.rand(weight.shape, generator=generator), target))
