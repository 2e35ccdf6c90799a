"""What recovery works on: a pruned model and its parent, whole in memory."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.checkpoint.format import Stored
from secateur.checkpoint.quantise import quantise
from secateur.checkpoint.shards import open_shard
from secateur.pruning.base import Base
from secateur.pruning.recovery import Grid, Pupil
from secateur.pruning.weight import rounded


def open_pupil(base: Base, shards: Iterable[Path], stored: Stored, future: Stored, device: torch.device) -> Pupil:
    """Load a base model, and beside it the same with the blocks of pruned shards; `future` says what it is to become.

    Both run in the precision of the base's blocks; float16, whose gradients would vanish, as bfloat16. Where values are
    to be integers, embedding and head of the pruned model are rounded as they will be.
    """
    tensors, dtype = base.tensors(device), base.computing_dtype()
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
                encoding = future.encoding_of(name)
                if encoding is not None:
                    found = quantise(weight, mask, None, values=encoding.values, group_size=encoding.group_size)
                    grids[name] = Grid(found.scales.to(device), masks[name], encoding)
    outside = {name: tensors[name] for name in base.outer_names()}
    if future.dense.encoding.bits:  # embedding and head will be integers too
        outside |= {name: rounded(outside[name], future.dense.encoding) for name in future.dense.shapes}
    model = base.loaded(outside | {name: one.to(dtype, copy=True) for name, one in blocks.items()})
    weights = {name: nn.Parameter(one.float()) for name, one in blocks.items()}
    return Pupil(model, base.loaded(tensors), weights, masks, grids)
