"""Codes that make up for each other's rounding: quantisation under a mask with the Gram matrix of the inputs.

Rounding each weight to its nearest code is best for one weight at a time. Here one column after the other takes the
code that is best given all others, so that what one weight loses its neighbours give back (coordinate descent on the
error of the layer; GPTQ, Frantar et al. 2023, does one pass of the same kind without a mask). The error never grows.
"""

import torch
from torch import Tensor

from secateur.checkpoint.quantise import OFFSETS, RANGES, Quantised, spread_scales
from secateur.pruning.layer_problem import LayerProblem

SWEEPS = 4
_BLOCK = 128  # columns after which the others are told what has changed


def settle(
    problem: LayerProblem, quantised: Quantised, mask: Tensor, *, bits: int, group_size: int, sweeps: int = SWEEPS
) -> Quantised:
    """Return better codes for the same scales.

    Parameters
    ----------
    problem
        Of the dense weight [out_features, in_features]: what is approximated.
    quantised
        Codes to begin with, such as the nearest ones.
    mask
        bool [out_features, in_features], True = kept; removed weights keep the code of 0.
    bits, group_size
        As `quantise` has them.
    sweeps
        How often each column is visited; it ends as soon as none changes.
    """
    lowest, highest = RANGES[bits]
    gram, device = problem.gram, problem.gram.device
    width = gram.shape[0]
    # All [in_features, out_features] from here on: an input's weights lie side by side.
    codes = (quantised.codes.to(device).float() - OFFSETS[bits]).T.contiguous()
    steps = (spread_scales(quantised.scales.to(device), group_size, width) * problem.norms).T.contiguous()
    steps *= mask.to(device).T  # what is removed, or has no scale, cannot move
    inverse = torch.where(steps != 0, 1 / torch.where(steps != 0, steps, 1.0), 0.0) / gram.diagonal()[:, None]
    residual = (problem.aim - (codes * steps).T @ gram).T.contiguous()
    for _ in range(sweeps):
        changed = False
        for begin in range(0, width, _BLOCK):
            end = min(width, begin + _BLOCK)
            here, moved = residual[begin:end].clone(), torch.empty(end - begin, codes.shape[1], device=device)
            for j in range(begin, end):
                wanted = torch.addcmul(codes[j], here[j - begin], inverse[j]).round_().clamp_(lowest, highest)
                move = torch.mul(wanted - codes[j], steps[j], out=moved[j - begin])
                codes[j] = wanted
                here[j + 1 - begin :].addr_(gram[j, j + 1 : end], move, alpha=-1)
            if bool(moved.any()):
                residual.addmm_(gram[begin:end].T, moved, alpha=-1)
                changed = True
        if not changed:
            break
    return Quantised((codes.T + OFFSETS[bits]).to(torch.uint8).contiguous().cpu(), quantised.scales)
