"""ADMM: a dense and a sparse copy of the weight that are pulled towards each other ever more strongly."""

import torch
from torch import Tensor

from secateur.calibration.statistics import InputStatistics
from secateur.models.products import product_precision
from secateur.pruning.layer_problem import LayerProblem, cholesky, refit
from secateur.pruning.masks import Target, keep_top
from secateur.pruning.method import Pruned, register

# Penalties, in units of the Gram matrix's diagonal, from 0.1 to 2.7. Each needs an inverse, which costs a wide weight
# as much as six steps: eight penalties of five steps have an error that is 0.5% lower, in half as much time again.
_PENALTIES = tuple(0.1 * 2.275**level for level in range(5))
_STEPS = 6  # with each of them
_REFIT_STEPS = 10


@register("admm", needs="cross_gram")
def admm(weight: Tensor, statistics: InputStatistics | None, target: Target) -> Pruned:
    """Find mask and weights together by alternating directions, then refit what is kept (Meng et al. 2024, alg. 1).

    The penalty on what parts the two copies grows, so that the mask can still change at first and settles at last.
    """
    assert statistics is not None  # noqa: S101 - the pipeline gives what `needs` names
    problem = LayerProblem.of(weight, statistics, target.correction)
    best = problem.best_dense()
    dense, dual = best.clone(), torch.zeros_like(best)  # the dual is divided by the penalty
    sparse, wanted = torch.empty_like(best), torch.empty_like(best)  # used again: fresh memory costs time
    previous = _PENALTIES[0]
    for penalty in _PENALTIES:
        dual *= previous / penalty
        previous = penalty
        raised = problem.gram.clone()
        raised.diagonal().add_(penalty)
        inverse = torch.cholesky_inverse(cholesky(raised))
        for _ in range(_STEPS):
            _sparse(torch.add(dense, dual, out=sparse), wanted, target)
            # Only what parts the copies from the best weight is multiplied: rounding that leaves as small an error.
            torch.sub(sparse, dual, out=wanted).sub_(best)
            with product_precision("medium", weight.device):
                torch.addmm(best, wanted, inverse, alpha=penalty, out=dense)
            dual += dense
            dual -= sparse
    mask = _sparse(torch.add(dense, dual, out=sparse), wanted, target)
    return Pruned(problem.restored(refit(problem, sparse, mask, _REFIT_STEPS), weight), mask.cpu())


def _sparse(weight: Tensor, scores: Tensor, target: Target) -> Tensor:
    """Make a weight the nearest one of the sparsity, and return its mask; `scores` is overwritten."""
    mask = keep_top(torch.abs(weight, out=scores), target).to(weight.device)
    weight *= mask
    return mask
