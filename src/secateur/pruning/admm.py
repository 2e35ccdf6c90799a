"""ADMM: a dense and a sparse copy of the weight that are pulled towards each other, while the mask is found."""

import torch
from torch import Tensor

from secateur.calibration.statistics import InputStatistics
from secateur.pruning.layer_problem import LayerProblem, refit
from secateur.pruning.masks import Target, keep_top
from secateur.pruning.method import Pruned, register

_STEPS = 30
_GROWING = 15  # steps in which the mask grows towards its sparsity; it stays as it is afterwards
_PENALTY = 1.0  # how strongly the copies are pulled, in units of the mean of the Gram matrix's diagonal
_REFIT_STEPS = 10


@register("admm", needs="gram")
def admm(weight: Tensor, statistics: InputStatistics | None, target: Target) -> Pruned:
    """Find mask and weights together by alternating directions, then refit what is kept (Boza 2024, alg. 2)."""
    assert statistics is not None  # noqa: S101 - the pipeline gives what `needs` names
    problem = LayerProblem.of(weight, statistics)
    width = problem.gram.shape[0]
    pulled = problem.gram.double() + _PENALTY * torch.eye(width, dtype=torch.float64, device=weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(pulled)).float()
    aim = problem.dense @ problem.gram
    dense, dual = problem.dense, torch.zeros_like(problem.dense)
    mask = torch.ones(dense.shape, dtype=torch.bool)
    for step in range(_STEPS):
        if step < _GROWING:
            share = 1 - (1 - (step + 1) / _GROWING) ** 3  # many at first, few at last
            mask = keep_top((dense + dual).abs(), Target(target.sparsity * share, target.granularity)).to(weight.device)
        sparse = (dense + dual) * mask
        dual += dense - sparse
        dense = (aim + _PENALTY * (sparse - dual)) @ inverse
    found = refit(problem, (dense + dual) * mask, mask, _REFIT_STEPS)
    return Pruned(problem.restored(found, weight), mask.cpu())
