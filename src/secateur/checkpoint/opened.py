"""A sub-model folder opened to be written in another format: what it says of itself, and its shards."""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.format import INDEX, Stored, check_quantization_config, read_json
from secateur.checkpoint.inspect import read_manifest
from secateur.errors import CheckpointError
from secateur.models.weights import FLOAT_TYPES


@dataclass(frozen=True)
class OpenedSubModel:
    """A sub-model whose weights have not been read.

    Attributes
    ----------
    path
        The folder.
    manifest
        The content of its `secateur.json`.
    config
        The content of its `config.json`, without `quantization_config`.
    stored
        How its weights are stored.
    dtype
        The base model's precision.
    shards
        Names of the files with weights, in order.
    """

    path: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    stored: Stored
    dtype: torch.dtype
    shards: tuple[str, ...]

    def check_complete(self, found: Container[str]) -> None:
        """Raise `CheckpointError` unless the names of the tensors found in the shards are all that there should be."""
        shapes = (*self.stored.pruned.shapes, *self.stored.dense.shapes)
        if missing := [name for name in shapes if name not in found]:
            raise CheckpointError(f"the shards that {INDEX} names lack {missing[0]!r}; derive or fetch it again")
        files = [name for name in self.manifest["files"] if name.endswith(".safetensors")]
        if unused := [name for name in files if name not in self.shards]:
            raise CheckpointError(f"{INDEX} does not name the shard {unused[0]!r}; derive or fetch the sub-model again")


def open_submodel(path: Path) -> OpenedSubModel:
    """Return what a sub-model folder says of itself; raises `CheckpointError` where that cannot be used."""
    manifest = read_manifest(path)
    config = read_json(path / "config.json")
    stored = check_quantization_config(config.pop("quantization_config", None))
    return OpenedSubModel(path, manifest, config, stored, _dtype(config), _shards(path, read_json(path / INDEX)))


def _dtype(config: dict[str, object]) -> torch.dtype:
    """Return the base model's precision, to which integers are unpacked."""
    said = config.get("dtype", config.get("torch_dtype"))
    known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_TYPES}
    if said not in known:
        raise CheckpointError(f"config.json names the precision {said!r}, known are {', '.join(known)}; fetch it again")
    return known[str(said)]


def _shards(source: Path, index: dict[str, object]) -> tuple[str, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{str(source / INDEX)!r} names no shards; derive or fetch the sub-model again")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{INDEX} names a shard {shard!r}, which is no plain file name; do not trust it")
    return tuple(shards)
