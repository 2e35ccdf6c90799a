"""The safetensors shards of a sub-model: one for each block, and a last one for everything outside the blocks."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.checkpoint.bitmask import SUFFIXES, PackedWeight, unpack
from secateur.errors import CheckpointError
from secateur.models.safetensors_writer import Lazy, write_safetensors

METADATA = {"format": "pt"}


def write_block_shard(path: Path, packed: Mapping[str, PackedWeight], others: Mapping[str, Tensor]) -> None:
    """Write the packed weights and the untouched tensors of one block; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, one in packed.items():
        tensors.update(one.tensors(name))
    write_safetensors(path, {**tensors, **others}, METADATA)


def write_outer_shard(
    path: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], load: Callable[[str], Tensor]
) -> None:
    """Write the tensors outside the blocks, read one at a time when their turn comes."""
    lazy = {name: Lazy(shape, dtype, lambda name=name: load(name)) for name, (shape, dtype) in shapes.items()}  # type: ignore[misc]
    write_safetensors(path, lazy, METADATA)


def read_shard(path: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Return the tensors of one shard by full name, packed weights unpacked.

    Raises
    ------
    CheckpointError
        When the file cannot be read, or a packed weight is incomplete, damaged or not in `shapes`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            packed = sorted({name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in SUFFIXES})
            parts = {f"{name}.{suffix}" for name in packed for suffix in SUFFIXES}
            if missing := sorted(parts - names) or [name for name in packed if name not in shapes]:
                raise CheckpointError(f"shard {str(path)!r} lacks {missing[0]!r}; derive or fetch the sub-model again")
            tensors = {name: file.get_tensor(name).clone() for name in sorted(names - parts)}
            for name in packed:
                parts_of = PackedWeight(*(file.get_tensor(f"{name}.{suffix}") for suffix in SUFFIXES))
                tensors[name], _ = unpack(parts_of, shapes[name], name)
            return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"shard {str(path)!r} cannot be read ({error}); derive or fetch it again") from None
