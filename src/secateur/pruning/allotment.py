"""The sparsity of each weight of one derivation, measured once and kept while the derivation goes on."""

from collections.abc import Callable
from pathlib import Path

import torch

from secateur.calibration.packing import CalibrationSet
from secateur.checkpoint.format import BUDGET, dump_json, read_json
from secateur.config import Recipe
from secateur.errors import CheckpointError
from secateur.files import atomic_write_bytes, release_freed_memory
from secateur.pruning.base import Base
from secateur.pruning.budgets import BUDGETS, Divergence
from secateur.pruning.divergence import measure_divergence
from secateur.pruning.masks import Target
from secateur.pruning.size import weight_bytes
from secateur.pruning.weight import encoding_of

_LEAST = 0.45  # of a sparsity at which parts are measured: what they lose below it is little beside the noise


def measures(recipe: Recipe) -> bool:
    """Return whether the whole model is run to find the sparsities."""
    return BUDGETS.get(recipe.budget).needs == "divergence" and recipe.sparsity > 0


def allot(  # noqa: PLR0917
    base: Base,
    recipe: Recipe,
    calibration: CalibrationSet,
    folder: Path,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Return the sparsity of each prunable weight by name, as the recipe's budget has it.

    What is measured for it is written into `folder`, where an interrupted derivation finds it again: so its other
    weights are pruned as the first ones were. `progress` is called with the blocks that are measured, and their number.
    """
    budget, shapes = BUDGETS.get(recipe.budget), base.shapes()
    encoding, itemsize = encoding_of(recipe), base.dtype().itemsize

    def size(shape: tuple[int, int], sparsity: float) -> int:
        return weight_bytes(shape, encoding, itemsize, sparsity, recipe.granularity)

    if not measures(recipe):
        return budget.function(shapes, recipe.sparsity, {}, size)
    path = folder / BUDGET
    try:
        return _checked(read_json(path), shapes.keys())
    except CheckpointError:  # it is the first run, or the disk has damaged the file
        divergence = _divergence(base, recipe, calibration, device, progress)
        found = budget.function(shapes, recipe.sparsity, divergence, size)
    atomic_write_bytes(path, dump_json(found))
    return found


def _divergence(
    base: Base,
    recipe: Recipe,
    calibration: CalibrationSet,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Divergence:
    model = base.loaded(base.tensors(device))
    target = Target(max(recipe.sparsity, _LEAST), recipe.granularity)
    token_ids = torch.from_numpy(calibration.token_ids)
    found = measure_divergence(model, base.blocks, token_ids, target, recipe.first_token_weight, progress)
    del model
    release_freed_memory()
    return found


def _checked(content: dict[str, object], names: object) -> dict[str, float]:
    """Return what was written; raises `CheckpointError` when it is anything else."""
    found = {name: one for name, one in content.items() if isinstance(one, float) and 0 <= one < 1}
    if found.keys() != names or len(found) != len(content):
        raise CheckpointError("the budget of an interrupted derivation is damaged")
    return found
