"""The bitmask codec, layout `rows`: a pruned weight as one bit for each position and the kept values in row order.

The bitmask is the mask: a kept weight may be zero, a removed one has no value. See docs/checkpoint-format.md. This is
the slow, obvious reference of the format.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.models.finite import all_finite

WORD_BITS = 64
ALIGNMENT = 64
SUFFIXES = ("bitmask", "values", "row_offsets")
VALUE_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class PackedWeight:
    """A pruned weight [out_features, in_features] as it is stored.

    Attributes
    ----------
    bitmask
        uint8 [out_features, ceil(in_features / 64) * 8]; bit i of a row, least significant first = weight i is kept.
    values
        bfloat16, float16 or float32, one-dimensional: the kept weights in row order, then zeros up to a whole number
        of 64 bytes.
    row_offsets
        int64 [out_features + 1]; where each row starts in `values`, in elements.
    """

    bitmask: Tensor
    values: Tensor
    row_offsets: Tensor

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors under the names they have in a file."""
        return {f"{name}.{suffix}": getattr(self, suffix) for suffix in SUFFIXES}


def bitmask_width(in_features: int) -> int:
    """Return the bytes of one row of a bitmask."""
    return -(-in_features // WORD_BITS) * (WORD_BITS // 8)


def pack(weight: Tensor, mask: Tensor) -> PackedWeight:
    """Pack the kept entries of a weight.

    Parameters
    ----------
    weight
        bfloat16, float16 or float32 [out_features, in_features].
    mask
        bool, same shape, True = kept.
    """
    kept = mask.cpu().contiguous().numpy()
    out_features, in_features = kept.shape
    bitmask = np.zeros((out_features, bitmask_width(in_features)), dtype=np.uint8)
    bits = np.packbits(kept, axis=1, bitorder="little")
    bitmask[:, : bits.shape[1]] = bits
    offsets = np.zeros(out_features + 1, dtype=np.int64)
    np.cumsum(np.count_nonzero(kept, axis=1), out=offsets[1:])
    whole = ALIGNMENT // weight.element_size()
    values = torch.zeros(-(-int(offsets[-1]) // whole) * whole, dtype=weight.dtype)
    positions = torch.from_numpy(np.flatnonzero(kept))
    torch.index_select(weight.cpu().contiguous().view(-1), 0, positions, out=values[: int(offsets[-1])])
    return PackedWeight(torch.from_numpy(bitmask), values, torch.from_numpy(offsets))


def unpack(packed: PackedWeight, shape: tuple[int, int], name: str = "weight") -> tuple[Tensor, Tensor]:
    """Return (weight with zeros where nothing was kept, mask), both [out_features, in_features].

    Raises
    ------
    CheckpointError
        When the parts contradict each other or the shape.
    """
    check(packed, shape, name)
    mask = torch.from_numpy(_bits(packed.bitmask, shape[1]))
    weight = torch.zeros(shape, dtype=packed.values.dtype)
    n_kept = int(packed.row_offsets[-1])
    weight.view(-1)[torch.from_numpy(np.flatnonzero(mask.numpy()))] = packed.values[:n_kept]
    return weight, mask


def _bits(bitmask: Tensor, in_features: int) -> np.ndarray:
    return np.unpackbits(bitmask.numpy(), axis=1, count=in_features, bitorder="little").view(np.bool_)


def check(packed: PackedWeight, shape: tuple[int, int], name: str) -> None:
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
            raise _damaged(name, f"{suffix} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(wanted)}")
    if values.dtype not in VALUE_TYPES or values.dim() != 1:
        raise _damaged(name, f"values are {values.dtype} {list(values.shape)}, expected a vector of floats")
    counts = np.bitwise_count(bitmask.numpy()).sum(axis=1, dtype=np.int64)
    if int(offsets[0]) != 0 or not np.array_equal(np.diff(offsets.numpy()), counts):
        raise _damaged(name, "row_offsets do not match the number of bits in the rows of the bitmask")
    last_bits = np.unpackbits(bitmask.numpy()[:, in_features // 8 :], axis=1, bitorder="little")[:, in_features % 8 :]
    if last_bits.any():
        raise _damaged(name, f"the bitmask marks positions beyond its {in_features} columns")
    n_kept, whole = int(offsets[-1]), ALIGNMENT // values.element_size()
    if values.numel() != -(-n_kept // whole) * whole:
        raise _damaged(name, f"{values.numel()} values are stored for {n_kept} kept weights")
    if not all_finite(values):
        raise _damaged(name, "values hold NaN or infinity")


def _damaged(name: str, problem: str) -> CheckpointError:
    return CheckpointError(f"packed weight {name!r} is damaged: {problem}; derive or fetch the sub-model again")
