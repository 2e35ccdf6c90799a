"""Finishing a sub-model folder: index, config, tokenizer and model card, and the manifest that hashes them all.

The caller writes the manifest last, so its presence means that the folder is whole. Nothing in the files it hashes
depends on the clock.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from secateur.checkpoint.card import model_card
from secateur.checkpoint.format import (
    CARD,
    INDEX,
    NOT_HASHED,
    LayerRecord,
    Stored,
    dump_json,
    quantization_config,
)
from secateur.files import atomic_write_bytes, sha256_file

# Files of a base model that a sub-model carries unchanged, when they are there.
CARRIED = (
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


@dataclass(frozen=True)
class Provenance:
    """How a sub-model was made: what goes into its manifest and card beside what the shards themselves say.

    Attributes
    ----------
    base_model
        `name`, `parameters` and `files` (SHA-256 of each weight file).
    recipe, calibration, versions
        Plain JSON data.
    dtype
        The base model's precision as its config names it, e.g. `bfloat16`.
    shortlist
        How many tokens a trimmed head computes, which, and what they cover; None when it computes all.
    recovery
        The text that it learnt from after it was pruned; None when it did not.
    vocabulary
        How many tokens it has of how many of the base model, and which; None when it has all.
    """

    base_model: Mapping[str, Any]
    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any]
    versions: Mapping[str, str]
    dtype: str
    shortlist: Mapping[str, Any] | None = None
    recovery: Mapping[str, Any] | None = None
    vocabulary: Mapping[str, Any] | None = None


def finish_submodel(
    folder: Path, base: Path, shards: Iterable[str], stored: Stored, provenance: Provenance
) -> dict[str, Any]:
    """Write everything but the shards and the manifest, and return the manifest's content.

    Parameters
    ----------
    folder
        The folder that holds the shards; other files in it (the log apart) are part of the sub-model.
    base
        The base model's folder.
    shards
        File names in order.
    stored
        How weights are stored; the pruned ones in the order of the model.
    """
    layers = _write_index(folder, shards, stored)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(stored)
    if not {"dtype", "torch_dtype"} & config.keys():
        # Without it a reader goes by the first tensor it meets, and that is another one than in the base's files.
        config["dtype"] = provenance.dtype
    atomic_write_bytes(folder / "config.json", dump_json(config))
    carry_files(base, folder)
    size = sum(layer.size for layer in layers)
    kept = sum(layer.kept for layer in layers)
    manifest: dict[str, Any] = {
        "format_version": 1,
        "base_model": dict(provenance.base_model),
        "recipe": dict(provenance.recipe),
        "calibration": dict(provenance.calibration),
        "values": stored.pruned.encoding.values,
        "prunable_weights": size,
        "kept_weights": kept,
        "sparsity": round(1 - kept / size, 6),
        **_eight_bits(stored),
        "layers": [layer.to_dict() for layer in layers],
        "versions": dict(provenance.versions),
    }
    for name in ("shortlist", "recovery", "vocabulary"):
        if (record := getattr(provenance, name)) is not None:
            manifest[name] = dict(record)
    atomic_write_bytes(folder / CARD, model_card(manifest).encode())
    hashed = sorted(path.name for path in folder.iterdir() if path.name not in NOT_HASHED)
    manifest["files"] = {name: sha256_file(folder / name) for name in hashed}
    return manifest


def _eight_bits(stored: Stored) -> dict[str, float]:
    """Return the share of the prunable entries that have eight bits where the others have four, if any have."""
    share = stored.share_in_eight_bits()
    return {"eight_bits": round(share, 6)} if share else {}


def carry_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation settings and licences from one model folder to another."""
    for path in carried_files(source):
        shutil.copyfile(path, target / path.name)


def carried_files(source: Path) -> list[Path]:
    """Return the files of a model folder that a sub-model carries unchanged."""
    return [path for pattern in CARRIED for path in sorted(source.glob(pattern)) if path.is_file()]


def _write_index(folder: Path, shards: Iterable[str], stored: Stored) -> tuple[LayerRecord, ...]:
    """Write the index from the shards' own headers; return what each pruned weight kept."""
    weight_map: dict[str, str] = {}
    shapes = stored.pruned.shapes
    kept = {name: shapes[name][0] * shapes[name][1] for name in stored.unmasked}
    total_size = 0
    for shard in shards:
        path = folder / shard
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                weight_map[key] = shard
                name, _, suffix = key.rpartition(".")
                if suffix == "bitmask" and name in shapes:  # offsets count bytes, which may hold two weights
                    kept[name] = int(np.bitwise_count(file.get_tensor(key).numpy()).sum(dtype=np.int64))
        total_size += path.stat().st_size
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    atomic_write_bytes(folder / INDEX, dump_json(index))
    return tuple(LayerRecord(name, shape, kept[name]) for name, shape in shapes.items())
