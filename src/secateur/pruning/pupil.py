"""What recovery works on: a pruned model and its parent, whole in memory."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.checkpoint.format import Encoding, Stored
from secateur.checkpoint.quantise import dequantise, quantise
from secateur.checkpoint.shards import open_shard
from secateur.config import Recipe
from secateur.models.structure import embedding_weights
from secateur.pruning.base import Base
from secateur.pruning.recovery import Grid, Pupil
from secateur.pruning.weight import dense_encoding_of, encoding_of


def open_pupil(base: Base, shards: Iterable[Path], stored: Stored, recipe: Recipe, device: torch.device) -> Pupil:
    """Load a base model, and beside it the same with the blocks of pruned shards; `recipe` says what it is to become.

    Both run in the precision of the base's blocks; float16, whose gradients would vanish, as bfloat16. Where values are
    to be integers, embedding and head of the pruned model are rounded as they will be.
    """
    tensors, dtype, encoding = base.tensors(device), base.computing_dtype(), encoding_of(recipe)
    blocks: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    grids: dict[str, Grid] = {}
    for path in shards:
        with open_shard(path, stored) as shard:
            for name in shard.tensors:
                weight, mask = shard.floats(name), shard.mask(name)
                blocks[name] = weight.to(device)
                if mask is None:
                    continue
                masks[name] = mask.to(device)
                if encoding.bits:
                    found = quantise(weight, mask, None, values=encoding.values, group_size=encoding.group_size)
                    grids[name] = Grid(found.scales.to(device), masks[name], encoding)
    outside = {name: tensors[name] for name in base.outer_names()}
    if encoding.bits:  # embedding and head will be integers too
        outside |= {
            name: _rounded(outside[name], dense_encoding_of(recipe))
            for name in embedding_weights(base.model)
            if name in outside
        }
    model = base.loaded(outside | {name: one.to(dtype, copy=True) for name, one in blocks.items()})
    weights = {name: nn.Parameter(one.float()) for name, one in blocks.items()}
    return Pupil(model, base.loaded(tensors), weights, masks, grids)


def _rounded(weight: Tensor, encoding: Encoding) -> Tensor:
    values, group_size = encoding.values, encoding.group_size
    rounded = quantise(weight, None, None, values=values, group_size=group_size)
    return dequantise(rounded, values=values, group_size=group_size, dtype=weight.dtype).to(weight.device)
