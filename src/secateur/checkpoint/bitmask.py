"""The bitmask codec, layout `rows`: a pruned weight as one bit for each position and the kept values in row order.

The bitmask is the mask: a kept weight may be zero, a removed one has no value. Values are floats, or integers with
scales. See docs/checkpoint-format.md. This is the slow, obvious reference of the format.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoint.format import FLOATS, Encoding
from secateur.checkpoint.integers import check_scales, damaged, from_bytes, row_bytes, spread_codes, to_bytes
from secateur.checkpoint.quantise import Quantised, dequantise
from secateur.models.finite import all_finite

WORD_BITS = 64
ALIGNMENT = 64
SUFFIXES = ("bitmask", "values", "row_offsets", "scales")
VALUE_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class PackedWeight:
    """A pruned weight [out_features, in_features] as it is stored.

    Attributes
    ----------
    bitmask
        uint8 [out_features, ceil(in_features / 64) * 8]; bit i of a row, least significant first = weight i is kept.
    values
        One-dimensional: the kept weights in row order, then zeros up to a whole number of 64 bytes. bfloat16, float16
        or float32; or uint8: codes of int8, or of int4 or nl4, two in a byte, low nibble first, each row beginning on a
        byte (`quantise.Codebook`).
    row_offsets
        int64 [out_features + 1]; where each row starts in `values`, in elements (bytes for integers).
    scales
        None for floats; bfloat16 [out_features, ceil(in_features / group_size)].
    """

    bitmask: Tensor
    values: Tensor
    row_offsets: Tensor
    scales: Tensor | None = None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors under the names they have in a file."""
        suffixes = stored_suffixes(FLOATS) if self.scales is None else SUFFIXES
        return {f"{name}.{suffix}": getattr(self, suffix) for suffix in suffixes}


def stored_suffixes(encoding: Encoding) -> tuple[str, ...]:
    """Return the suffixes of the tensors that a pruned weight has."""
    return SUFFIXES if encoding.bits else SUFFIXES[:-1]


def bitmask_width(in_features: int) -> int:
    """Return the bytes of one row of a bitmask."""
    return -(-in_features // WORD_BITS) * (WORD_BITS // 8)


def pack(weight: Tensor, mask: Tensor) -> PackedWeight:
    """Pack the kept entries of a weight as they are.

    Parameters
    ----------
    weight
        bfloat16, float16 or float32 [out_features, in_features].
    mask
        bool, same shape, True = kept.
    """
    kept = mask.cpu().contiguous().numpy()
    offsets = _offsets(np.count_nonzero(kept, axis=1))
    values = torch.zeros(_padded(int(offsets[-1]), weight.element_size()), dtype=weight.dtype)
    positions = torch.from_numpy(np.flatnonzero(kept))
    torch.index_select(weight.cpu().contiguous().view(-1), 0, positions, out=values[: int(offsets[-1])])
    return PackedWeight(_bitmask(kept), values, torch.from_numpy(offsets))


def pack_integers(quantised: Quantised, mask: Tensor, bits: int) -> PackedWeight:
    """Pack the kept codes of a quantised weight; mask as for `pack`."""
    kept = mask.cpu().contiguous().numpy()
    counts = np.count_nonzero(kept, axis=1)
    offsets = _offsets(row_bytes(counts, bits))
    values = torch.zeros(_padded(int(offsets[-1]), 1), dtype=torch.uint8)
    values.numpy()[: int(offsets[-1])] = to_bytes(quantised.codes.numpy()[kept], counts, bits)
    return PackedWeight(_bitmask(kept), values, torch.from_numpy(offsets), quantised.scales)


def _bitmask(kept: np.ndarray) -> Tensor:
    bitmask = np.zeros((kept.shape[0], bitmask_width(kept.shape[1])), dtype=np.uint8)
    bits = np.packbits(kept, axis=1, bitorder="little")
    bitmask[:, : bits.shape[1]] = bits
    return torch.from_numpy(bitmask)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _padded(n_values: int, itemsize: int) -> int:
    whole = ALIGNMENT // itemsize
    return -(-n_values // whole) * whole


def unpack(
    packed: PackedWeight,
    shape: tuple[int, int],
    name: str = "weight",
    encoding: Encoding = FLOATS,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return (weight with zeros where nothing was kept, mask), both [out_features, in_features].

    Floats keep their own precision; `dtype` is that of a weight stored as integers. Their products are exact in
    float32, and rounded once in another.

    Raises
    ------
    CheckpointError
        When the parts contradict each other, the shape or the encoding.
    """
    if encoding.bits:
        quantised, mask = unpack_integers(packed, shape, name, encoding)
        weight = dequantise(quantised, values=encoding.values, group_size=encoding.group_size, dtype=dtype)
        return weight, torch.from_numpy(mask)
    check(packed, shape, name, encoding)
    mask = _mask(packed, shape)
    weight = torch.zeros(shape, dtype=packed.values.dtype)
    n_kept = int(packed.row_offsets[-1])
    weight.view(-1)[torch.from_numpy(np.flatnonzero(mask))] = packed.values[:n_kept]
    return weight, torch.from_numpy(mask)


def unpack_integers(
    packed: PackedWeight, shape: tuple[int, int], name: str, encoding: Encoding
) -> tuple[Quantised, np.ndarray]:
    """Return the codes of a weight stored as integers, and its mask [out_features, in_features]; see `unpack`."""
    check(packed, shape, name, encoding)
    assert packed.scales is not None  # noqa: S101 - `check` has seen to it
    mask = _mask(packed, shape)
    stored = packed.values.numpy()[: int(packed.row_offsets[-1])]
    kept = from_bytes(stored, np.count_nonzero(mask, axis=1), encoding.bits, name)
    return Quantised(spread_codes(kept, mask, encoding.values), packed.scales), mask


def _mask(packed: PackedWeight, shape: tuple[int, int]) -> np.ndarray:
    return np.unpackbits(packed.bitmask.numpy(), axis=1, count=shape[1], bitorder="little").view(np.bool_)


def check(packed: PackedWeight, shape: tuple[int, int], name: str, encoding: Encoding = FLOATS) -> None:
    """Check that the parts of a packed weight agree; raises `CheckpointError` with what does not."""
    out_features, in_features = shape
    bitmask, values, offsets = packed.bitmask, packed.values, packed.row_offsets
    expected = {
        "bitmask": (torch.uint8, (out_features, bitmask_width(in_features))),
        "row_offsets": (torch.int64, (out_features + 1,)),
    }
    for suffix, (dtype, wanted) in expected.items():
        tensor = getattr(packed, suffix)
        if tensor.dtype != dtype or tuple(tensor.shape) != wanted:
            raise damaged(name, f"{suffix} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(wanted)}")
    integers = encoding.bits > 0
    if values.dtype not in ((torch.uint8,) if integers else VALUE_TYPES) or values.dim() != 1:
        said = "bytes" if integers else "floats"
        raise damaged(name, f"values are {values.dtype} {list(values.shape)}, expected a vector of {said}")
    counts = np.bitwise_count(bitmask.numpy()).sum(axis=1, dtype=np.int64)
    lengths = row_bytes(counts, encoding.bits) if encoding.bits else counts
    if int(offsets[0]) != 0 or not np.array_equal(np.diff(offsets.numpy()), lengths):
        raise damaged(name, "row_offsets do not match the number of bits in the rows of the bitmask")
    last_bits = np.unpackbits(bitmask.numpy()[:, in_features // 8 :], axis=1, bitorder="little")[:, in_features % 8 :]
    if last_bits.any():
        raise damaged(name, f"the bitmask marks positions beyond its {in_features} columns")
    if values.numel() != _padded(int(offsets[-1]), values.element_size()):
        raise damaged(name, f"{values.numel()} values are stored for {int(counts.sum())} kept weights")
    if integers:
        check_scales(packed.scales, shape, encoding, name)
    elif packed.scales is not None:
        raise damaged(name, "there are scales beside floats")
    elif not all_finite(values):
        raise damaged(name, "values hold NaN or infinity")
