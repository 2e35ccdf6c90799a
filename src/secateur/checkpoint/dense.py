"""Matrices that are stored whole, without a bitmask: as integers with scales, or as floats in another order of rows.

The slow, obvious reference of this part of the format, beside the codec of bitmasks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoint.bitmask import VALUE_TYPES
from secateur.checkpoint.format import Encoding
from secateur.checkpoint.integers import check_scales, damaged, from_bytes, to_bytes
from secateur.checkpoint.quantise import Quantised, dequantise
from secateur.models.finite import all_finite

SUFFIXES = ("values", "scales")


@dataclass(frozen=True)
class DenseWeight:
    """A matrix [out_features, in_features] as it is stored.

    Attributes
    ----------
    values
        uint8 [out_features, in_features], codes of int8; or uint8 [out_features, ceil(in_features / 2)], codes of int4
        or nl4, low nibble first (`quantise.Codebook`); or floats [out_features, in_features].
    scales
        None for floats; bfloat16 [out_features, ceil(in_features / group_size)].
    """

    values: Tensor
    scales: Tensor | None = None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors under the names they have in a file."""
        parts = {"values": self.values, "scales": self.scales}
        return {f"{name}.{suffix}": tensor for suffix, tensor in parts.items() if tensor is not None}

    def take_rows(self, rows: Tensor) -> "DenseWeight":
        """Return the matrix whose row i is row `rows[i]` of this one."""
        return DenseWeight(self.values[rows], None if self.scales is None else self.scales[rows])


def stored_suffixes(encoding: Encoding) -> tuple[str, ...]:
    """Return the suffixes of the tensors that such a matrix has."""
    return SUFFIXES if encoding.bits else SUFFIXES[:1]


def stored_width(in_features: int, encoding: Encoding) -> int:
    """Return the number of values of a row, in elements of their tensor."""
    return (in_features + 1) // 2 if encoding.bits == 4 else in_features


def pack_dense(quantised: Quantised, encoding: Encoding) -> DenseWeight:
    """Return a quantised matrix of which nothing was removed, as it is stored."""
    rows, columns = quantised.codes.shape
    stored = to_bytes(quantised.codes.numpy().reshape(-1), np.full(rows, columns), encoding.bits)
    return DenseWeight(torch.from_numpy(stored).view(rows, stored_width(columns, encoding)), quantised.scales)


def unpack_dense(
    stored: DenseWeight,
    shape: tuple[int, int],
    name: str,
    encoding: Encoding,
    dtype: torch.dtype = torch.float32,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """Return the matrix [out_features, in_features]; floats keep their precision, integers become `dtype`.

    With `rows` int64 [out_features] row i of the result is the stored row `rows[i]`.

    Raises
    ------
    CheckpointError
        When the parts contradict each other or the shape.
    """
    if encoding.bits:
        quantised = unpack_dense_integers(stored, shape, name, encoding, rows=rows)
        return dequantise(quantised, values=encoding.values, group_size=encoding.group_size, dtype=dtype)
    check_dense(stored, shape, name, encoding)
    return stored.values if rows is None else stored.values[rows]


def unpack_dense_integers(
    stored: DenseWeight, shape: tuple[int, int], name: str, encoding: Encoding, *, rows: Tensor | None = None
) -> Quantised:
    """Return the codes and scales of a matrix of integers; takes and raises what `unpack_dense` does."""
    check_dense(stored, shape, name, encoding)
    if rows is not None:
        stored = stored.take_rows(rows)
    codes = from_bytes(stored.values.numpy().reshape(-1), np.full(shape[0], shape[1]), encoding.bits, name)
    assert stored.scales is not None  # noqa: S101 - `check_dense` has seen to it
    return Quantised(torch.from_numpy(codes).view(shape), stored.scales)


def check_dense(stored: DenseWeight, shape: tuple[int, int], name: str, encoding: Encoding) -> None:
    """Check types, shapes and scales, not codes; raises `CheckpointError` with what does not fit."""
    values, scales = stored.values, stored.scales
    wanted = [shape[0], stored_width(shape[1], encoding)]
    types = (torch.uint8,) if encoding.bits else VALUE_TYPES
    if values.dtype not in types or list(values.shape) != wanted:
        said = "bytes" if encoding.bits else "floats"
        raise damaged(name, f"values are {values.dtype} {list(values.shape)}, expected {said} {wanted}")
    if encoding.bits:
        check_scales(scales, shape, encoding, name)
    elif scales is not None:
        raise damaged(name, "there are scales beside floats")
    elif not all_finite(values):
        raise damaged(name, "values hold NaN or infinity")
