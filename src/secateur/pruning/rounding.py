"""Codes that make up for each other's rounding: quantisation under a mask with the Gram matrix of the inputs.

Rounding each weight to its nearest code is best for one weight at a time. Here the codes of a row are chosen together,
in two steps. First one column after the other is rounded, and the columns behind it take over what that has cost (GPTQ,
Frantar et al. 2023; what was removed stays 0, and passes on what it should have taken). Then each column in turn takes
the code that is best given all others, before and behind it (coordinate descent on the error of the layer). The first
step gives the second one a better place to begin: it would stop too early from the nearest codes.
"""

import torch
from torch import Tensor

from secateur.checkpoint.quantise import CODEBOOKS, Codebook, Quantised, spread_scales
from secateur.pruning.layer_problem import LayerProblem

SWEEPS = 4
_TINY = 1e-37
_BLOCK = 128  # columns after which the others are told what has changed


def settle(
    problem: LayerProblem,
    weight: Tensor,
    quantised: Quantised,
    mask: Tensor,
    *,
    values: str,
    group_size: int,
    sweeps: int = SWEEPS,
) -> Quantised:
    """Return better codes for the same scales; the error of the layer is no larger than with those that are given.

    Parameters
    ----------
    problem
        Of the dense weight [out_features, in_features]: what is approximated.
    weight
        The pruned weight, not scaled: where the first step begins. What is not kept is ignored.
    quantised
        Its nearest codes, with which a row begins where the first step has found none that are better.
    mask
        bool [out_features, in_features], True = kept; removed weights keep the code that stands for them.
    values, group_size
        As `quantise` has them.
    sweeps
        How often the second step visits each column; it ends as soon as none changes.
    """
    device = problem.gram.device
    # All [in_features, out_features] from here on: an input's weights lie side by side.
    book = CODEBOOKS[values]
    nearest = book.numbers(quantised.codes.to(device)).T.contiguous()
    spread = spread_scales(quantised.scales.to(device), group_size, len(problem.gram))
    steps = (spread * problem.norms).T.contiguous()
    steps *= mask.to(device).T  # what is removed, or has no scale, cannot move
    begin = (weight.to(device).float() * problem.norms).T * mask.to(device).T
    problem = problem.at_rest(begin.T)
    codes = _better_rows(problem, steps, nearest, _in_order(problem, begin.contiguous(), steps, book))
    codes = _descend(problem, codes, steps, book, sweeps)
    return Quantised(book.codes(codes.T.contiguous(), mask.to(device)).cpu(), quantised.scales)


def _in_order(problem: LayerProblem, weight: Tensor, steps: Tensor, book: Codebook) -> Tensor:
    """Round one column after the other and let those behind it take over the difference; takes the weight."""
    upper = problem.factor().to(weight.device)
    inverse, codes, width = _inverse(steps), torch.zeros_like(weight), len(weight)
    for begin in range(0, width, _BLOCK):
        end = min(width, begin + _BLOCK)
        here, errors = weight[begin:end], torch.empty_like(weight[begin:end])
        for j in range(begin, end):
            code = _nearest(book, torch.mul(here[j - begin], inverse[j], out=codes[j]), steps[j])
            error = torch.addcmul(here[j - begin], code, steps[j], value=-1, out=errors[j - begin])
            error /= upper[j, j]
            here[j + 1 - begin :].addr_(upper[j, j + 1 : end], error, alpha=-1)
        weight[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    return codes


def _better_rows(problem: LayerProblem, steps: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return for each row of the weight (a column here) those of two sets of codes whose error is less."""

    def error(codes: Tensor) -> Tensor:  # but for what is the same of both: q G q - 2 q aim
        values = codes * steps
        return (values * (problem.gram @ values - 2 * problem.aim.T)).sum(0)

    return torch.where(error(second) < error(first), second, first)


def _descend(problem: LayerProblem, codes: Tensor, steps: Tensor, book: Codebook, sweeps: int) -> Tensor:
    """Let each column take its best code given all others, until none changes or `sweeps` are done; takes the codes."""
    gram, width = problem.gram, len(codes)
    inverse = _inverse(steps) / gram.diagonal()[:, None]
    residual = (problem.aim - (codes * steps).T @ gram).T.contiguous()
    for _ in range(sweeps):
        changed = False
        for begin in range(0, width, _BLOCK):
            end = min(width, begin + _BLOCK)
            here, moved = residual[begin:end].clone(), torch.empty_like(residual[begin:end])
            for j in range(begin, end):
                wanted = _nearest(book, torch.addcmul(codes[j], here[j - begin], inverse[j]), steps[j])
                move = torch.mul(wanted - codes[j], steps[j], out=moved[j - begin])
                codes[j] = wanted
                here[j + 1 - begin :].addr_(gram[j, j + 1 : end], move, alpha=-1)
            if bool(moved.any()):
                residual.addmm_(gram[begin:end].T, moved, alpha=-1)
                changed = True
        if not changed:
            break
    return codes


def _nearest(book: Codebook, values: Tensor, steps: Tensor) -> Tensor:
    """Return the nearest numbers, in the place of values; 0 stays where a step is 0, which no other number would do."""
    nearest = book.nearest(values)
    return nearest if book.levels is None else nearest.masked_fill_(steps == 0, 0.0)


def _inverse(steps: Tensor) -> Tensor:
    """Return 1 / steps, and 0 where a step is 0, or so small that this would be infinite."""
    moves = steps.abs() > _TINY
    return torch.where(moves, 1 / torch.where(moves, steps, 1.0), 0.0)
