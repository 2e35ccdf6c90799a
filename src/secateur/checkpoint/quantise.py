"""Weights as small integers with a scale for each group of consecutive input positions.

`quantise` looks for the scales that lose least, weighted by how loud each input is. It knows nothing of bitmasks or
files: codes come and go as [out_features, in_features].
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.errors import ModelError

# Codes are stored unsigned: value = (code - OFFSETS[bits]) * scale.
OFFSETS = {8: 128, 4: 8}
RANGES = {8: (-127, 127), 4: (-8, 7)}  # of a code less its offset
# The scales that are tried put the group's largest entry at these codes. A code beyond the range clips that entry, but
# serves all others better; -8 has no +8, so for int4 the sign of the scale matters too.
_PEAK_CODES = {
    8: (120.0, 122.0, 124.0, 126.0, 128.0, 130.0, 132.0, 134.0),
    4: (-7.5, 7.5, -8.0, 8.0, -8.5, 8.5, -9.5, 9.5, -10.5, 10.5),
}
# Entries worked on at a time: five arrays of this size stay in the cache, and torch starts no threads for so few.
_CHUNK = (1 << 15) - 1

# Scales are relative to the largest entry of the weight; the inverse of a smaller one might overflow.
_NOTHING = 1e-30

Array = np.ndarray


@dataclass(frozen=True)
class Quantised:
    """A weight as integers.

    Attributes
    ----------
    codes
        uint8 [out_features, in_features], offset binary; the offset itself (value 0) where nothing is kept.
    scales
        bfloat16 [out_features, ceil(in_features / group_size)], finite; for int4 they may be negative; 0 for a group
        that keeps nothing but zeros.
    """

    codes: Tensor
    scales: Tensor


def n_groups(in_features: int, group_size: int) -> int:
    """Return the number of scales in a row."""
    return -(-in_features // group_size)


def quantise(
    weight: Tensor, mask: Tensor | None, importance: Tensor | None, *, bits: int, group_size: int
) -> Quantised:
    """Find codes q and scales s that make sum_j importance_j * (w_ij - s * q_ij)^2 small in every group.

    Scales around the one that spans the group are tried, each fitted to its codes by least squares
    (s = sum(importance * w * q) / sum(importance * q^2)); the best is rounded to bfloat16 before its codes are chosen.
    The result is never worse than rounding with max|w| / 127 or max|w| / 7, and does not depend on the number of
    threads.

    Parameters
    ----------
    weight
        Float [out_features, in_features].
    mask
        bool, same shape, True = kept; None keeps all.
    importance
        Float [in_features], finite, at least 0: the sum of squares of each input. None counts all alike.
    bits
        8 for codes -127 to 127, 4 for codes -8 to 7.
    group_size
        Consecutive input positions, kept or not, that share a scale.

    Raises
    ------
    ModelError
        When the weight holds NaN or infinity.
    """
    out_features, in_features = weight.shape
    groups = n_groups(in_features, group_size)
    codes = torch.empty(out_features, in_features, dtype=torch.uint8)
    scales = torch.empty(out_features, groups, dtype=torch.bfloat16)
    if weight.numel() == 0:
        return Quantised(codes, scales.zero_())
    exponent = _exponent(weight)
    rows = max(1, _CHUNK // (groups * group_size))
    loudness = _columns(_normalised(importance, in_features).repeat(rows, 1), groups, group_size)
    for start in range(0, out_features, rows):
        part = weight[start : start + rows].to("cpu", torch.float32)
        if mask is not None:
            part = part * mask[start : start + rows].cpu()
        columns = np.ldexp(_columns(part, groups, group_size), -exponent)
        found, scale = _search(columns, loudness[:, : columns.shape[1]], bits)
        whole = found.T.reshape(len(part), groups * group_size)[:, :in_features]
        np.add(whole, OFFSETS[bits], out=codes[start : start + rows].numpy(), casting="unsafe")
        scales[start : start + rows] = torch.from_numpy(np.ldexp(scale, exponent)).view(len(part), groups)
    return Quantised(codes, scales)


def spread_scales(scales: Tensor, group_size: int, in_features: int) -> Tensor:
    """Return the scale of each entry, float32 [rows, in_features], of scales [rows, groups]."""
    return scales.float().repeat_interleave(group_size, 1)[:, :in_features]


def dequantise(quantised: Quantised, *, bits: int, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (code - offset) * scale [out_features, in_features].

    Products are exact in float32; another dtype rounds each once. A product of 0 is +0, also under a negative scale.
    """
    codes, scales = quantised.codes, quantised.scales
    weight = torch.empty(codes.shape, dtype=dtype)
    rows = max(1, 16 * _CHUNK // max(1, codes.shape[1]))
    for start in range(0, len(codes), rows):
        part = codes[start : start + rows].float().sub_(OFFSETS[bits])
        part *= spread_scales(scales[start : start + rows], group_size, codes.shape[1])
        weight[start : start + rows] = part.add_(0.0)  # which turns -0 into +0
    return weight


def _exponent(weight: Tensor) -> int:
    """Return e with max|w| < 2^e: squares of weights that are divided by it neither overflow nor all vanish."""
    lowest, highest = (float(one) for one in torch.aminmax(weight))
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ModelError("a weight that is to be quantised holds NaN or infinity; derive from another model or method")
    return int(np.frexp(max(-lowest, highest))[1])


def _normalised(importance: Tensor | None, in_features: int) -> Tensor:
    """Return float32 [1, in_features] with a maximum of 1."""
    if importance is None or not bool(importance.any()):
        return torch.ones(1, in_features)
    return (importance.to("cpu", torch.float64) / importance.max().item()).float()[None]


def _columns(rows: Tensor, groups: int, group_size: int) -> Array:
    """Return [group_size, rows * groups]: a group in each column, the last of a row filled up with zeros.

    So sums over a group are sums of whole rows, and a scale for each group is one row: both long and contiguous.
    """
    padded = torch.nn.functional.pad(rows, (0, groups * group_size - rows.shape[1]))
    return np.ascontiguousarray(padded.view(-1, group_size).numpy().T)


def _search(weight: Array, loudness: Array, bits: int) -> tuple[Array, Array]:
    """Return (codes [group_size, n] as floats, scales [n], which are bfloat16 numbers), both float32."""
    lowest, highest = weight.min(axis=0), weight.max(axis=0)
    peak = np.where(-lowest > highest, lowest, highest)  # [n], with its sign
    weighted, codes, scratch = weight * loudness, np.empty_like(weight), np.empty_like(weight)
    explained, fitted = np.full_like(peak, -1), np.zeros_like(peak)
    for peak_code in _PEAK_CODES[bits]:
        _round(weight, peak / np.float32(peak_code), bits, codes)
        candidate, gain = _fit(weighted, loudness, codes, scratch)
        better = gain > explained
        explained[better], fitted[better] = gain[better], candidate[better]
    best, best_error = np.zeros_like(peak), np.full_like(peak, np.inf)
    scale = _bfloat16(np.abs(peak) / np.float32(RANGES[bits][1]))
    for following in (_bfloat16(fitted), None):
        _round(weight, scale, bits, codes)
        error = _error(weight, loudness, codes, scale, scratch)
        better = error < best_error
        best[better], best_error[better] = scale[better], error[better]
        if following is not None:
            scale = following
    again, _ = _fit(weighted, loudness, codes, scratch)  # the codes have moved since the scale was fitted
    scale = _bfloat16(again)
    _round(weight, scale, bits, codes)
    better = _error(weight, loudness, codes, scale, scratch) < best_error
    best[better] = scale[better]
    _round(weight, best, bits, codes)
    return codes, best


def _round(weight: Array, scale: Array, bits: int, codes: Array) -> None:
    """Write the nearest codes [group_size, n] for scales [n]; 0 where the scale is nothing beside max|w|."""
    lowest, highest = RANGES[bits]
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > _NOTHING)
    np.multiply(weight, inverse, out=codes)
    np.rint(codes, out=codes)
    torch.from_numpy(codes).clamp_(lowest, highest)  # several times faster than numpy's


def _fit(weighted: Array, loudness: Array, codes: Array, scratch: Array) -> tuple[Array, Array]:
    """Return (the scale that fits the codes best, the squares that it explains), both [n]; 0 where all codes are 0."""
    along = _dot(weighted, codes)
    np.multiply(codes, loudness, out=scratch)
    size = _dot(codes, scratch)
    scale = np.divide(along, size, out=np.zeros_like(along), where=size > 0)
    return scale, scale * along


def _error(weight: Array, loudness: Array, codes: Array, scale: Array, scratch: Array) -> Array:
    """Return sum(loudness * (weight - scale * codes)^2) over each group, [n]."""
    np.multiply(codes, scale, out=scratch)
    np.subtract(weight, scratch, out=scratch)
    np.multiply(scratch, scratch, out=scratch)
    return _dot(scratch, loudness)


def _dot(left: Array, right: Array) -> Array:
    """Return the sum of products over each column, [n]: row after row, so the same whatever other columns there are."""
    if left.shape[1] == 1:  # a lone column would be summed along itself, in another order
        left, right = np.repeat(left, 2, axis=1), np.repeat(right, 2, axis=1)
        return _dot(left, right)[:1]
    sums: Array = np.einsum("gn,gn->n", left, right)
    return sums


def _bfloat16(numbers: Array) -> Array:
    rounded: Array = torch.from_numpy(numbers).bfloat16().float().numpy()
    return rounded
