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
    codes = quantised.codes.to(device).float() - OFFSETS[bits]
    steps = spread_scales(quantised.scales.to(device), group_size, width) * problem.norms
    free = mask.to(device) & (steps != 0)
    inverse = torch.where(free, 1 / torch.where(free, steps, 1.0), 0.0) / gram.diagonal()
    residual = problem.aim - (codes * steps) @ gram
    for _ in range(sweeps):
        changed = False
        for begin in range(0, width, _BLOCK):
            end = min(width, begin + _BLOCK)
            here, moved = residual[:, begin:end].clone(), torch.zeros(len(codes), end - begin, device=device)
            for j in range(begin, end):
                code = codes[:, j]
                wanted = (code + here[:, j - begin] * inverse[:, j]).round_().clamp_(lowest, highest)
                move = torch.where(free[:, j], (wanted - code) * steps[:, j], 0.0)
                codes[:, j] = torch.where(free[:, j], wanted, code)
                here -= move[:, None] * gram[j, begin:end]
                moved[:, j - begin] = move
            if bool(moved.any()):
                residual -= moved @ gram[begin:end]
                changed = True
        if not changed:
            break
    return Quantised((codes + OFFSETS[bits]).to(torch.uint8).cpu(), quantised.scales)
