"""Weights as small integers with a scale for each group of consecutive input positions.

`quantise` looks for the scales that lose least, weighted by how loud each input is. It knows nothing of bitmasks or
files: codes come and go as [out_features, in_features].
"""

import functools
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from secateur.errors import ModelError

Array = np.ndarray
_HALVES = 256  # below this are twice all levels


@dataclass(frozen=True)
class Codebook:
    """The numbers that codes stand for, of which a weight holds multiples by a scale.

    Attributes
    ----------
    lowest, highest
        The smallest and the largest number.
    offset
        Evenly spaced numbers are whole, and this is the code of 0, which also stands where nothing is kept.
    levels
        Numbers that are not evenly spaced, ascending; that of code i is `levels[i]`, and 0 is not among them. Where
        nothing is kept, and only in memory, the code is how many there are. None for evenly spaced ones.
    peaks
        The scales that are tried put the group's largest entry at these numbers. One beyond the range clips that entry,
        but serves all others better; where the range is not symmetric the sign of the scale matters too.
    """

    lowest: int
    highest: int
    offset: int
    peaks: tuple[float, ...]
    levels: tuple[int, ...] | None = None

    @property
    def removed(self) -> int:
        """The code of what is not kept."""
        return self.offset if self.levels is None else len(self.levels)

    def numbers(self, codes: Tensor) -> Tensor:
        """Return what codes uint8 stand for, float32 of the same shape; 0 where nothing is kept."""
        if self.levels is None:
            return codes.float().sub_(self.offset)
        return _all_levels(self.levels, codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)

    def codes(self, numbers: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the codes uint8 of numbers in the book; `kept` bool of the same shape is False where nothing is kept.

        A number that is kept and not in the book has the code of the next one, as a 0 that no scale changes.
        """
        if self.levels is None:
            return numbers.add(self.offset).to(torch.uint8)
        found = torch.bucketize(numbers, _all_levels(self.levels, numbers.device)[:-1], out_int32=True).to(torch.uint8)
        return found if kept is None else found.masked_fill_(~kept, self.removed)

    def nearest(self, values: Tensor) -> Tensor:
        """Return the numbers that are nearest to values, in the place of these; also where nothing is kept."""
        if self.levels is None:
            return values.round_().clamp_(self.lowest, self.highest)
        places = values.mul_(2).floor_().clamp_(-_HALVES, _HALVES - 1).add_(_HALVES).to(torch.int32)
        return values.copy_(
            _nearest_levels(self.levels, values.device).index_select(0, places.view(-1)).view_as(values)
        )


@functools.cache
def _all_levels(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """Return what each code stands for, the last one for what is not kept."""
    return torch.tensor((*levels, 0), dtype=torch.float32, device=device)


@functools.cache
def _nearest_levels(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the level that is nearest to k / 2 up to (k + 1) / 2, for k from -256 on: none changes within a half.

    Many times as fast as a search among the levels.
    """
    ends = torch.tensor(levels, dtype=torch.float32)
    middle = (torch.arange(-_HALVES, _HALVES) + 0.5) / 2
    return ends[torch.bucketize(middle, (ends[1:] + ends[:-1]) / 2)].to(device)


# By how values are called. The levels of nl4 are those of llama.cpp's IQ4_NL: weights are many near 0 and few far away.
CODEBOOKS = MappingProxyType(
    {
        "int8": Codebook(-127, 127, 128, (120.0, 122.0, 124.0, 126.0, 128.0, 130.0, 132.0, 134.0)),
        "int4": Codebook(-8, 7, 8, (-7.5, 7.5, -8.0, 8.0, -8.5, 8.5, -9.5, 9.5, -10.5, 10.5)),
        "nl4": Codebook(
            -127,
            113,
            0,
            (-115.0, 102.0, -121.0, 108.0, -127.0, 113.0, -135.0, 120.0, -146.0, 130.0),
            (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
        ),
    }
)
# Entries worked on at a time: five arrays of this size stay in the cache, and torch starts no threads for so few.
_CHUNK = (1 << 15) - 1

# Scales are relative to the largest entry of the weight; the inverse of a smaller one might overflow.
_NOTHING = 1e-30


@dataclass(frozen=True)
class Quantised:
    """A weight as integers.

    Attributes
    ----------
    codes
        uint8 [out_features, in_features], see `Codebook`; `Codebook.removed` (value 0) where nothing is kept.
    scales
        bfloat16 [out_features, ceil(in_features / group_size)], finite; in four bits they may be negative; 0 for a
        group that keeps nothing but zeros.
    """

    codes: Tensor
    scales: Tensor


def n_groups(in_features: int, group_size: int) -> int:
    """Return the number of scales in a row."""
    return -(-in_features // group_size)


def quantise(
    weight: Tensor, mask: Tensor | None, importance: Tensor | None, *, values: str, group_size: int
) -> Quantised:
    """Find numbers q of a codebook and scales s that make sum_j importance_j * (w_ij - s * q_ij)^2 small in all groups.

    Scales around the one that spans the group are tried, each fitted to its codes by least squares
    (s = sum(importance * w * q) / sum(importance * q^2)); the best is rounded to bfloat16 before its codes are chosen.
    The result is never worse than rounding with max|w| over the codebook's largest number, and does not depend on the
    number of threads.

    Parameters
    ----------
    weight
        Float [out_features, in_features].
    mask
        bool, same shape, True = kept; None keeps all.
    importance
        Float [in_features], finite, at least 0: the sum of squares of each input. None counts all alike.
    values
        A name of `CODEBOOKS`.
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
    exponent, book = _exponent(weight), CODEBOOKS[values]
    rows = max(1, _CHUNK // (groups * group_size))
    loudness = _columns(_normalised(importance, in_features).repeat(rows, 1), groups, group_size)
    for start in range(0, out_features, rows):
        part = weight[start : start + rows].to("cpu", torch.float32)
        if mask is not None:
            part = part * mask[start : start + rows].cpu()
        columns = np.ldexp(_columns(part, groups, group_size), -exponent)
        there = _columns(
            torch.ones_like(part) if mask is None else mask[start : start + rows].cpu().float(), groups, group_size
        )
        found, scale = _search(columns, loudness[:, : columns.shape[1]], there, book)
        whole = found.T.reshape(len(part), groups * group_size)[:, :in_features]
        kept = None if mask is None else mask[start : start + rows].cpu()
        codes[start : start + rows] = book.codes(torch.from_numpy(np.ascontiguousarray(whole)), kept)
        scales[start : start + rows] = torch.from_numpy(np.ldexp(scale, exponent)).view(len(part), groups)
    return Quantised(codes, scales)


def spread_scales(scales: Tensor, group_size: int, in_features: int) -> Tensor:
    """Return the scale of each entry, float32 [rows, in_features], of scales [rows, groups]."""
    return scales.float().repeat_interleave(group_size, 1)[:, :in_features]


def dequantise(quantised: Quantised, *, values: str, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers of the codes times their scales [out_features, in_features].

    Products are exact in float32; another dtype rounds each once. A product of 0 is +0, also under a negative scale.
    """
    codes, scales = quantised.codes, quantised.scales
    weight = torch.empty(codes.shape, dtype=dtype)
    rows = max(1, 16 * _CHUNK // max(1, codes.shape[1]))
    for start in range(0, len(codes), rows):
        part = CODEBOOKS[values].numbers(codes[start : start + rows])
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


def _search(weight: Array, loudness: Array, there: Array, book: Codebook) -> tuple[Array, Array]:
    """Return (numbers [group_size, n], scales [n], which are bfloat16 numbers), both float32.

    there: [group_size, n], 1 for what is kept and 0 elsewhere.
    """
    lowest, highest = weight.min(axis=0), weight.max(axis=0)
    peak = np.where(-lowest > highest, lowest, highest)  # [n], with its sign
    weighted, codes, scratch = weight * loudness, np.empty_like(weight), np.empty_like(weight)

    def round_to(scale: Array) -> None:
        _round(weight, scale, there, book, codes)

    explained, fitted = np.full_like(peak, -1), np.zeros_like(peak)
    for peak_code in book.peaks:
        round_to(peak / np.float32(peak_code))
        candidate, gain = _fit(weighted, loudness, codes, scratch)
        better = gain > explained
        explained[better], fitted[better] = gain[better], candidate[better]
    best, best_error = np.zeros_like(peak), np.full_like(peak, np.inf)
    scale = _bfloat16(np.abs(peak) / np.float32(book.highest))
    for following in (_bfloat16(fitted), None):
        round_to(scale)
        error = _error(weight, loudness, codes, scale, scratch)
        better = error < best_error
        best[better], best_error[better] = scale[better], error[better]
        if following is not None:
            scale = following
    again, _ = _fit(weighted, loudness, codes, scratch)  # the codes have moved since the scale was fitted
    scale = _bfloat16(again)
    round_to(scale)
    better = _error(weight, loudness, codes, scale, scratch) < best_error
    best[better] = scale[better]
    round_to(best)
    return codes, best


def _round(weight: Array, scale: Array, there: Array, book: Codebook, codes: Array) -> None:
    """Write the nearest numbers [group_size, n] for scales [n], and 0 for what is not there.

    Where the scale is nothing beside max|w| they are those nearest to 0.
    """
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > _NOTHING)
    np.multiply(weight, inverse, out=codes)
    book.nearest(torch.from_numpy(codes))  # several times faster than numpy
    if book.levels is not None:
        np.multiply(codes, there, out=codes)


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
