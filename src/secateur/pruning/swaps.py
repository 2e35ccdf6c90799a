"""Swaps: Wanda's mask, improved by exchanging a kept weight of a row for a removed one as long as that helps.

It needs no inverse of the Gram matrix, and so about a third of admm's time for wide weights. Behind admm no swap is
left that helps (docs/results/methods.md), so it is a method of its own and no step behind others.
"""

import torch
from torch import Tensor

from secateur.calibration.statistics import InputStatistics
from secateur.pruning.layer_problem import LayerProblem, refit
from secateur.pruning.masks import Target, keep_top
from secateur.pruning.method import Pruned, register

_ROUNDS = 60  # of one swap in each row
_CANDIDATES = 24  # of each side, whose pairs are tried
_REFIT_EVERY, _REFIT_BETWEEN, _REFIT_STEPS = 10, 4, 10
_TINY = 1e-7  # of the squares of a row: a swap that gains less is rounding


@register("swaps", needs="cross_gram")
def swaps(weight: Tensor, statistics: InputStatistics | None, target: Target) -> Pruned:
    """Begin with Wanda's mask, refit what is kept, and swap weights of a row while that lowers the error of the layer.

    A row keeps as many weights as Wanda gives it.
    """
    assert statistics is not None  # noqa: S101 - the pipeline gives what `needs` names
    problem = LayerProblem.of(weight, statistics, target.correction)
    mask = keep_top(problem.dense.abs(), target).to(weight.device)
    found = refit(problem, problem.dense, mask, _REFIT_STEPS)
    found, mask = swap(problem, found, mask)
    return Pruned(problem.restored(refit(problem, found, mask, _REFIT_STEPS), weight), mask.cpu())


def swap(problem: LayerProblem, scaled: Tensor, mask: Tensor, rounds: int = _ROUNDS) -> tuple[Tensor, Tensor]:
    """Return a weight and its mask in which swaps have been made, the best one of each row in each round.

    The error of a row is E(w) = (w - v) G (w - v)^T, and r = (v - w) G its residual. Without w_i it grows by
    w_i^2 G_ii + 2 w_i r_i, and the best w_j in its place takes (r_j + w_i G_ij)^2 / G_jj away again. The pairs are
    tried of those i that cost least and those j that gain most by themselves.

    Parameters
    ----------
    problem
        The least squares of the weight.
    scaled, mask
        Float32 and bool [out_features, in_features], columns scaled as in the problem, 0 where the mask is False.
    rounds
        At most; it ends as soon as no swap helps.
    """
    gram, diagonal = problem.gram, problem.gram.diagonal()
    found, mask = scaled.clone(), mask.clone()
    residual = problem.aim - found @ gram
    least = _TINY * problem.dense.square().sum(1)
    candidates = min(_CANDIDATES, int(mask.sum(1).min()), int((~mask).sum(1).min()))
    for number in range(1, rounds + 1) if candidates else ():
        leaving, coming, change = _best_pairs(gram, diagonal, found, mask, residual, candidates)
        rows = (change < -least).nonzero().squeeze(1)
        if not len(rows):
            break
        i, j = leaving[rows], coming[rows]
        gone = found[rows, i]
        put = (residual[rows, j] + gone * gram[i, j]) / diagonal[j]
        found[rows, i], found[rows, j] = torch.zeros_like(gone), put
        mask[rows, i], mask[rows, j] = False, True
        residual[rows] += gone[:, None] * gram[i] - put[:, None] * gram[j]
        if number % _REFIT_EVERY == 0:
            found = refit(problem, found, mask, _REFIT_BETWEEN)
            residual = problem.aim - found @ gram
    return found, mask


def _best_pairs(  # noqa: PLR0917
    gram: Tensor, diagonal: Tensor, found: Tensor, mask: Tensor, residual: Tensor, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row the position that should leave, the one that should come, and how the error changes."""
    cost = torch.where(mask, found * (found * diagonal + 2 * residual), torch.inf)
    costs, leaving = cost.topk(candidates, 1, largest=False)
    coming = torch.where(mask, -torch.inf, residual.square() / diagonal).topk(candidates, 1).indices
    moved = found.gather(1, leaving)[:, :, None] * gram[leaving[:, :, None], coming[:, None, :]]
    gains = (residual.gather(1, coming)[:, None, :] + moved).square() / diagonal[coming][:, None, :]
    change, at = (costs[:, :, None] - gains).flatten(1).min(1)
    rows = torch.arange(len(found), device=found.device)
    return leaving[rows, at // candidates], coming[rows, at % candidates], change
