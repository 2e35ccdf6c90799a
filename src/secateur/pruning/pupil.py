"""What recovery works on: a pruned model and its parent, whole in memory; and what was learnt, as weights by name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.checkpoint.format import Stored
from secateur.checkpoint.shards import open_shard
from secateur.models.weights import Weights, load_skeleton, set_parameters
from secateur.pruning.base import Base
from secateur.pruning.recovery import Pupil


def open_pupil(base: Base, shards: Iterable[Path], stored: Stored, device: torch.device) -> Pupil:
    """Load a base model, and beside it the same with the blocks of pruned shards.

    Both run in the precision of the base's blocks; float16, whose gradients would vanish, as bfloat16.
    """
    dtype = torch.bfloat16 if base.dtype() == torch.float16 else base.dtype()
    with base.reader as reader:
        tensors = {name: reader.read(name).to(device, dtype) for name in base.stored_names()}
    parent = _model(base, tensors)
    outside = {name: tensors[name] for name in base.outer_names()}
    blocks: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for path in shards:
        with open_shard(path, stored) as shard:
            for name in shard.tensors:
                blocks[name] = shard.floats(name).to(device)
                if (mask := shard.mask(name)) is not None:
                    masks[name] = mask.to(device)
    model = _model(base, outside | {name: one.to(dtype, copy=True) for name, one in blocks.items()})
    return Pupil(model, parent, {name: nn.Parameter(one.float()) for name, one in blocks.items()}, masks)


def _model(base: Base, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    model = load_skeleton(base.folder)
    set_parameters(model, dict(tensors))
    model.tie_weights()
    return model


class Learnt:
    """The weights that a pupil has learnt, in the precision that the base stores; others are the base's own."""

    def __init__(self, weights: Mapping[str, Tensor], base: Weights) -> None:
        self._weights, self._base = weights, base

    def __enter__(self) -> "Learnt":
        self._base.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._base.__exit__(kind, error, traceback)

    def mapped(self, name: str) -> Tensor:
        """Return a tensor that may be used only while they are open."""
        original = self._base.mapped(name)
        return self._weights[name].detach().cpu().to(original.dtype) if name in self._weights else original

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        return self.mapped(name).clone()
