"""What each weight of one derivation gets, sparsity and bits: measured once, and kept while the derivation goes on."""

from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.packing import CalibrationSet
from secateur.calibration.statistics import InputStatistics
from secateur.checkpoint.format import (
    BUDGET,
    EIGHT_BIT_ENCODING,
    FLOATS,
    Encoding,
    Stored,
    StoredWeights,
    dump_json,
    read_json,
)
from secateur.config import Recipe
from secateur.errors import CheckpointError
from secateur.files import atomic_write_bytes
from secateur.pruning.base import Base
from secateur.pruning.budgets import BUDGETS, Divergence, worth_most
from secateur.pruning.divergence import Change, measure_divergence, wanda_pruned
from secateur.pruning.masks import Target
from secateur.pruning.size import eight_bits_bytes, weight_bytes
from secateur.pruning.weight import encoding_of, is_unmasked, rounded
from secateur.resources import release_freed_memory

_LEAST = 0.45  # of a sparsity at which parts are measured: what they lose below it is little beside the noise


@dataclass(frozen=True)
class Allotment:
    """What each prunable weight of one derivation gets.

    Attributes
    ----------
    encoding
        How kept weights are stored.
    sparsity
        Target sparsity by name.
    eight_bits
        Names of those that have eight bits where `encoding` has four.
    """

    encoding: Encoding
    sparsity: Mapping[str, float] = field(default_factory=dict)
    eight_bits: frozenset[str] = frozenset()

    def encoding_of(self, name: str) -> Encoding:
        """Return how a weight is stored."""
        return EIGHT_BIT_ENCODING if name in self.eight_bits else self.encoding

    def is_unmasked(self, name: str) -> bool:
        """Return whether a weight is stored without a bitmask."""
        return is_unmasked(self.encoding, self.sparsity[name])

    def stored(self, shapes: Mapping[str, tuple[int, int]]) -> Stored:
        """Say how some of the weights are stored, [out_features, in_features] of each by name."""
        unmasked = frozenset(name for name in shapes if self.is_unmasked(name))
        return Stored(
            StoredWeights(self.encoding, shapes), unmasked=unmasked, eight_bits=self.eight_bits & shapes.keys()
        )

    def in_floats(self) -> "Allotment":
        """Return the same sparsities, of weights that are not rounded."""
        return replace(self, encoding=FLOATS, eight_bits=frozenset())


def measures(recipe: Recipe) -> bool:
    """Return whether the whole model is run to find what each weight gets."""
    return recipe.eight_bits > 0 or (BUDGETS.get(recipe.budget).needs == "divergence" and recipe.sparsity > 0)


def allot(  # noqa: PLR0917
    base: Base,
    recipe: Recipe,
    calibration: CalibrationSet,
    folder: Path,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Allotment:
    """Return what each prunable weight gets, as the recipe's budget and its share of eight bits have it.

    What is measured for it is written into `folder`, where an interrupted derivation finds it again: so its other
    weights are pruned as the first ones were. `progress` is called with the blocks that are measured, and their number.
    """
    budget, shapes, encoding = BUDGETS.get(recipe.budget), base.shapes(), encoding_of(recipe)
    itemsize = base.dtype().itemsize

    def size(shape: tuple[int, int], sparsity: float) -> int:
        return weight_bytes(shape, encoding, itemsize, sparsity, recipe.granularity)

    def measured(change: Change) -> Divergence:
        return _divergence(base, recipe, calibration, device, change, progress)

    def sparsities() -> dict[str, float]:
        target = Target(max(recipe.sparsity, _LEAST), recipe.granularity)
        divergence = measured(partial(wanda_pruned, target=target)) if measures(recipe) else {}
        return budget.function(shapes, recipe.sparsity, divergence, size)

    def bits() -> dict[str, int]:
        more = {name: eight_bits_bytes(shape) - size(shape, 0.0) for name, shape in shapes.items()}
        chosen = worth_most(measured(partial(rounded_by_loudness, encoding=encoding)), more, recipe.eight_bits)
        return {name: 8 if name in chosen else 4 for name in shapes}

    path = folder / BUDGET
    if recipe.eight_bits:
        found = _once(path, shapes.keys(), lambda one: one in (4, 8), bits)
        eight_bits = frozenset(name for name, one in found.items() if one == 8)
        return Allotment(encoding, dict.fromkeys(shapes, 0.0), eight_bits)
    if not measures(recipe):
        return Allotment(encoding, sparsities())
    return Allotment(
        encoding, _once(path, shapes.keys(), lambda one: isinstance(one, float) and 0 <= one < 1, sparsities)
    )


def _divergence(  # noqa: PLR0917
    base: Base,
    recipe: Recipe,
    calibration: CalibrationSet,
    device: torch.device,
    change: Change,
    progress: Callable[[int, int], None],
) -> Divergence:
    model = base.loaded(base.tensors(device))
    token_ids = torch.from_numpy(calibration.token_ids)
    found = measure_divergence(model, base.blocks, token_ids, change, recipe.first_token_weight, progress)
    del model
    release_freed_memory()
    return found


def rounded_by_loudness(weight: Tensor, statistics: InputStatistics, encoding: Encoding) -> Tensor:
    """Return a weight rounded by itself, where errors count by how loud inputs are: what is measured to choose."""
    return rounded(weight, encoding, statistics.loudness())


def _once(
    path: Path, names: Set[str], is_right: Callable[[Any], bool], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return what was written for each name; where there is nothing usable, measure and write it."""
    with suppress(CheckpointError):  # it is the first run, or the disk has damaged the file
        content = read_json(path)
        if content.keys() == names and all(map(is_right, content.values())):
            return content
    found = measure()
    atomic_write_bytes(path, dump_json(found))
    return found
