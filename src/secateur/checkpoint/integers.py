"""Integer codes as they are stored, checked before use: two int4 in a byte, scales, and codes under a mask.

Slow and obvious, like the codec of bitmasks that uses it. How codes are found is `quantise`'s business.
"""

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoint.format import Encoding
from secateur.checkpoint.quantise import CODEBOOKS, n_groups
from secateur.errors import CheckpointError
from secateur.models.finite import all_finite

Array = np.ndarray


def damaged(name: str, problem: str) -> CheckpointError:
    """Return the error for a stored weight whose parts contradict each other."""
    return CheckpointError(f"packed weight {name!r} is damaged: {problem}; derive or fetch the sub-model again")


def row_bytes(counts: Array, bits: int) -> Array:
    """Return the bytes of rows with so many codes; each row begins on a byte."""
    return counts if bits == 8 else (counts + 1) // 2


def to_bytes(codes: Array, counts: Array, bits: int) -> Array:
    """Return the stored bytes of the codes of all rows, one after another.

    codes: uint8, row by row; counts: int64 [rows], codes in each. The unused nibble of an odd row is 0.
    """
    if bits == 8:
        return codes
    if codes.size and codes.max() > 15:
        raise ValueError(f"code {codes.max()} does not fit into four bits: what is not kept was to be packed")
    used = _used_nibbles(counts)
    nibbles = np.zeros(len(used), dtype=np.uint8)
    nibbles[used] = codes
    return nibbles[0::2] | nibbles[1::2] << 4


def from_bytes(stored: Array, counts: Array, bits: int, name: str) -> Array:
    """Return the codes of all rows (see `to_bytes`); raises `CheckpointError` for bytes that no writer makes."""
    if bits == 8:
        if not stored.all():
            raise damaged(name, "values hold the int8 code -128, which is not used")
        return stored
    nibbles = np.empty(2 * len(stored), dtype=np.uint8)
    nibbles[0::2], nibbles[1::2] = stored & 15, stored >> 4
    used = _used_nibbles(counts)
    if nibbles[~used].any():
        raise damaged(name, "the unused half of a row's last byte is not 0")
    kept: Array = nibbles[used]
    return kept


def _used_nibbles(counts: Array) -> Array:
    """Tell for each nibble of all rows whether it holds a code: all but the last one of an odd row."""
    ends = 2 * np.cumsum(row_bytes(counts, 4))
    used = np.ones(ends[-1] if len(ends) else 0, dtype=np.bool_)
    used[ends[counts % 2 == 1] - 1] = False
    return used


def check_scales(scales: Tensor | None, shape: tuple[int, int], encoding: Encoding, name: str) -> None:
    """Raise `CheckpointError` unless there is a finite scale for each group of each row."""
    wanted = [shape[0], n_groups(shape[1], encoding.group_size)]
    if scales is None or scales.dtype != torch.bfloat16 or list(scales.shape) != wanted:
        received = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise damaged(name, f"scales are {received}, expected {torch.bfloat16} {wanted}")
    if not all_finite(scales):
        raise damaged(name, "scales hold NaN or infinity")


def spread_codes(kept: Array, mask: Array, values: str) -> Tensor:
    """Return codes uint8 [out_features, in_features]: kept [n] where mask (bool) is True, else the code of 0."""
    codes = np.full(mask.shape, CODEBOOKS[values].removed, dtype=np.uint8)
    codes[mask] = kept
    return torch.from_numpy(codes)
