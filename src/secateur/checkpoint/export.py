"""A sub-model in formats that other programs read."""

import json
from collections.abc import Callable
from pathlib import Path

from secateur.checkpoint.export_gguf import export_gguf
from secateur.checkpoint.format import INDEX, dump_json
from secateur.checkpoint.opened import OpenedSubModel, open_submodel
from secateur.checkpoint.shards import METADATA, read_shard
from secateur.checkpoint.submodel import carry_files
from secateur.errors import ConfigError, OutputError
from secateur.files import atomic_folder, atomic_write_bytes
from secateur.models.safetensors_writer import write_safetensors
from secateur.registry import Registry

# Each takes the sub-model, the path to write, and the type of the weights, if one was asked for.
FORMATS: Registry[Callable[[OpenedSubModel, Path, str | None], None]] = Registry("export format")


def export(
    path: str | Path,
    *,
    output: str | Path,
    format: str = "dense",  # noqa: A002 - the field's word
    type: str | None = None,  # noqa: A002 - the field's word
) -> Path:
    """Write a sub-model in another format.

    Parameters
    ----------
    path
        A sub-model folder.
    output
        What to write; it must not exist. A folder for `dense`, a file `*.gguf` for `gguf`.
    format
        `dense`: an ordinary Hugging Face folder with zeros where weights were removed, which opens without secateur.
        `gguf`: one file for llama.cpp and what is built on it.
    type
        Only with `gguf`: how the weights are stored, see `export_gguf.TYPES`; None keeps the values of the sub-model.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    UnknownNameError, ConfigError, CheckpointError, ModelError, OutputError
    """
    write = FORMATS.get(format)
    target = Path(output)
    write(open_submodel(Path(path)), target, type)
    return target


@FORMATS.register("dense")
def _dense(submodel: OpenedSubModel, target: Path, kind: str | None) -> None:
    if kind is not None:
        raise ConfigError(f"type {kind!r} is for the format gguf; a dense folder has the precision of the base model")
    if target.suffix.lower() == ".gguf":
        raise OutputError(f"{target} would be a folder; add `--format gguf` for a file, or choose another name")
    with atomic_folder(target) as folder:
        weight_map: dict[str, str] = {}
        total = 0
        for shard in submodel.shards:
            tensors = read_shard(submodel.path / shard, submodel.stored, submodel.dtype)
            write_safetensors(folder / shard, tensors, METADATA)
            weight_map.update(dict.fromkeys(tensors, shard))
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        submodel.check_complete(weight_map)
        config = json.dumps(submodel.config, indent=2, ensure_ascii=False) + "\n"
        atomic_write_bytes(folder / INDEX, dump_json({"metadata": {"total_size": total}, "weight_map": weight_map}))
        atomic_write_bytes(folder / "config.json", config.encode())
        carry_files(submodel.path, folder)


FORMATS.add("gguf", export_gguf)
