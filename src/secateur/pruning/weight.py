"""One weight on its way from the base model to the shard: pruned, quantised, packed."""

import torch
from torch import Tensor

from secateur.calibration.statistics import InputStatistics
from secateur.checkpoint.bitmask import PackedWeight, pack, pack_integers, unpack
from secateur.checkpoint.dense import DenseWeight, pack_dense, unpack_dense
from secateur.checkpoint.format import DENSE_ENCODINGS, FLOATS, Encoding
from secateur.checkpoint.quantise import Quantised, dequantise, quantise
from secateur.config import Recipe
from secateur.pruning.layer_problem import LayerProblem
from secateur.pruning.masks import Target, zero_removed
from secateur.pruning.method import Method, Pruned
from secateur.pruning.rounding import settle


def prune_weight(  # noqa: PLR0917
    method: Method,
    target: Target,
    encoding: Encoding,
    name: str,
    weight: Tensor,
    statistics: InputStatistics | None,
    dtype: torch.dtype,
) -> tuple[PackedWeight | DenseWeight, Tensor]:
    """Prune a weight in its own precision, and quantise it.

    Returns it as it is stored, and what a reader will make of that in the precision `dtype`.
    """
    with torch.inference_mode():
        if target.sparsity == 0:  # what loses nothing stays as it is, to the bit
            pruned = Pruned(weight, torch.ones(weight.shape, dtype=torch.bool))
        else:
            pruned = method.function(weight, statistics, target)
        codes = _quantise(encoding, target, pruned, statistics, weight) if encoding.bits else None
        return pack_weight(encoding, name, pruned, codes, dtype, unmasked=is_unmasked(encoding, target.sparsity))


def encoding_of(recipe: Recipe) -> Encoding:
    """Return how kept weights are stored; for the base's own precision that is any of the known floats."""
    return FLOATS if recipe.values == "base" else Encoding(recipe.values, recipe.group_size or 0)


def dense_encoding_of(recipe: Recipe) -> Encoding:
    """Return how embedding and head are stored where kept weights are integers."""
    return DENSE_ENCODINGS[recipe.embedding_values]


def rounded(weight: Tensor, encoding: Encoding, importance: Tensor | None = None) -> Tensor:
    """Return a weight as a reader will have it, in its own precision, when nothing is removed and no code makes up.

    `importance` [in_features] is how much an error at each input counts.
    """
    values, group_size = encoding.values, encoding.group_size
    codes = quantise(weight, None, importance, values=values, group_size=group_size)
    return dequantise(codes, values=values, group_size=group_size, dtype=weight.dtype).to(weight.device)


def is_unmasked(encoding: Encoding, sparsity: float) -> bool:
    """Return whether a weight is stored without a bitmask: one that loses no entry, where values are integers."""
    return encoding.bits > 0 and sparsity == 0


def _quantise(
    encoding: Encoding, target: Target, pruned: Pruned, statistics: InputStatistics | None, dense: Tensor
) -> Quantised:
    """Return codes for what is kept; with a Gram matrix they make up for each other, and for what was removed."""
    values, group_size = encoding.values, encoding.group_size
    importance = None if statistics is None else statistics.loudness()
    nearest = quantise(pruned.weight, pruned.mask, importance, values=values, group_size=group_size)
    if statistics is None or statistics.gram is None:
        return nearest
    problem = LayerProblem.of(dense, statistics, target.correction)
    return settle(problem, pruned.weight, nearest, pruned.mask, values=values, group_size=group_size)


def pack_weight(
    encoding: Encoding,
    name: str,
    pruned: Pruned,
    codes: Quantised | None,
    dtype: torch.dtype,
    *,
    unmasked: bool = False,
) -> tuple[PackedWeight | DenseWeight, Tensor]:
    """Return a pruned weight as it is stored, and what a reader will make of that; integers come as `codes`."""
    if codes is None:
        return pack(pruned.weight, pruned.mask), zero_removed(pruned.weight, pruned.mask)
    shape = (pruned.mask.shape[0], pruned.mask.shape[1])
    if unmasked:
        dense = pack_dense(codes, encoding)
        return dense, unpack_dense(dense, shape, name, encoding, dtype)
    packed = pack_integers(codes, pruned.mask, encoding.bits)
    return packed, unpack(packed, shape, name, encoding, dtype)[0]
