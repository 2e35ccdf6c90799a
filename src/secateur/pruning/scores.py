"""Methods that give each weight a score and keep the highest; they change no weight that they keep."""

import torch
from torch import Tensor

from secateur.calibration.statistics import InputStatistics
from secateur.pruning.masks import Target, keep_top
from secateur.pruning.method import Pruned, register


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
