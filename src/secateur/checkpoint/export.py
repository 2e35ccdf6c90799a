"""A sub-model in formats that other programs read."""

import json
from pathlib import Path

import torch

from secateur.checkpoint.format import INDEX, check_quantization_config, dump_json, read_json
from secateur.checkpoint.inspect import read_manifest
from secateur.checkpoint.shards import METADATA, read_shard
from secateur.checkpoint.submodel import carry_files
from secateur.errors import CheckpointError
from secateur.files import atomic_folder, atomic_write_bytes
from secateur.models.safetensors_writer import write_safetensors
from secateur.models.weights import FLOAT_TYPES
from secateur.registry import Registry

FORMATS: Registry[str] = Registry("export format")
FORMATS.add("dense", "an ordinary Hugging Face folder with zeros where weights were removed; opens without secateur")


def export(path: str | Path, *, output: str | Path, format: str = "dense") -> Path:  # noqa: A002 - the field's word
    """Write a sub-model in another format.

    Parameters
    ----------
    path
        A sub-model folder.
    output
        The folder to write; it must not exist.
    format
        A name from `FORMATS`.

    Returns
    -------
    Path
        The folder that was written.

    Raises
    ------
    UnknownNameError, CheckpointError, OutputError
    """
    FORMATS.get(format)
    source, target = Path(path), Path(output)
    manifest = read_manifest(source)
    config = read_json(source / "config.json")
    stored = check_quantization_config(config.pop("quantization_config", None))
    dtype = _dtype(config)
    index = read_json(source / INDEX)
    with atomic_folder(target) as folder:
        weight_map: dict[str, str] = {}
        total = 0
        shards = _shards(source, index)
        for shard in shards:
            tensors = read_shard(source / shard, stored, dtype)
            write_safetensors(folder / shard, tensors, METADATA)
            weight_map.update(dict.fromkeys(tensors, shard))
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if missing := [name for name in (*stored.pruned.shapes, *stored.dense.shapes) if name not in weight_map]:
            raise CheckpointError(f"the shards that {INDEX} names lack {missing[0]!r}; derive or fetch it again")
        if unused := [name for name in manifest["files"] if name.endswith(".safetensors") and name not in shards]:
            raise CheckpointError(f"{INDEX} does not name the shard {unused[0]!r}; derive or fetch the sub-model again")
        atomic_write_bytes(folder / INDEX, dump_json({"metadata": {"total_size": total}, "weight_map": weight_map}))
        atomic_write_bytes(folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
        carry_files(source, folder)
    return target


def _dtype(config: dict[str, object]) -> torch.dtype:
    """Return the base model's precision, to which integers are unpacked."""
    said = config.get("dtype", config.get("torch_dtype"))
    known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_TYPES}
    if said not in known:
        raise CheckpointError(f"config.json names the precision {said!r}, known are {', '.join(known)}; fetch it again")
    return known[str(said)]


def _shards(source: Path, index: dict[str, object]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{str(source / INDEX)!r} names no shards; derive or fetch the sub-model again")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{INDEX} names a shard {shard!r}, which is no plain file name; do not trust it")
    return shards
