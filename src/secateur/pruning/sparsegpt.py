"""SparseGPT: columns are pruned from left to right, and those to the right make up for it."""

import torch
from torch import Tensor

from secateur.calibration.statistics import InputStatistics
from secateur.pruning.layer_problem import LayerProblem
from secateur.pruning.masks import Target, keep_top
from secateur.pruning.method import Pruned, register

_BLOCK = 128  # columns whose mask is chosen together


@register("sparsegpt", needs="gram")
def sparsegpt(weight: Tensor, statistics: InputStatistics | None, target: Target) -> Pruned:
    """Prune 128 columns at a time and let the columns behind them make up for it (Frantar & Alistarh 2023, alg. 1).

    Each block of columns loses the share that brings the columns so far to the sparsity. Scores compete within the
    block's part of a row, or within the whole block for `per_layer`, as in the paper.
    """
    assert statistics is not None  # noqa: S101 - the pipeline gives what `needs` names
    problem = LayerProblem.of(weight, statistics, target.correction)
    upper, current = problem.factor().to(weight.device), problem.dense.clone()
    width = current.shape[1]
    mask = torch.empty(current.shape, dtype=torch.bool, device=weight.device)
    each = len(current) if target.granularity == "per_layer" else 1
    removed = 0
    for begin in range(0, width, _BLOCK):
        end = min(width, begin + _BLOCK)
        here = round(target.sparsity * end * each) - removed
        removed += here
        columns, factor = current[:, begin:end], upper[begin:end, begin:end]
        score = (columns / factor.diagonal()).square()
        kept = keep_top(score, Target(here / (end - begin) / each, target.granularity)).to(weight.device)
        errors = torch.empty_like(columns)
        for j in range(end - begin):
            error = columns[:, j] * ~kept[:, j] / factor[j, j]
            columns[:, j:] -= error[:, None] * factor[j, j:]
            errors[:, j] = error
        mask[:, begin:end] = kept
        current[:, end:] -= errors @ upper[begin:end, end:]
    return Pruned(problem.restored(current * mask, weight), mask.cpu())
