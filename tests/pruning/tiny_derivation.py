"""Derivations of tiny models without a corpus, and what came out of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from secateur.calibration.documents import Provenance
from secateur.calibration.packing import CalibrationSet, token_ids_hash
from secateur.checkpoint.bitmask import PackedWeight, stored_suffixes, unpack
from secateur.checkpoint.format import LOG, check_quantization_config, read_json
from secateur.checkpoint.shards import read_shard
from secateur.models.source import ModelFolder
from secateur.pruning.derive import SubModel, derive

PROVENANCE = Provenance("python", "random tokens", "1", "CC0-1.0", "0" * 64)


def calibration(samples: int = 5, sequence_length: int = 48, seed: int = 0) -> CalibrationSet:
    """Random tokens; 48 of them are more than the 32 of the tiny models' sliding windows."""
    token_ids = np.random.default_rng(seed).integers(0, 256, (samples, sequence_length), dtype=np.int64)
    return CalibrationSet(token_ids, seed, (("python", 1.0),), (PROVENANCE,), token_ids_hash(token_ids), {})


def derive_tiny(base: Path, output: Path, **options: object) -> SubModel:
    options = {"calibration": calibration(), "threads": 1, "method": "wanda", **options}
    return derive(ModelFolder(base, "tiny"), output=output, **options)


def masks_and_weights(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (mask, weight) [out_features, in_features] of every pruned weight, from the shards."""
    config = check_quantization_config(read_json(folder / "config.json")["quantization_config"])
    stored, suffixes = config.pruned, stored_suffixes(config.pruned.encoding)
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = {key.rpartition(".")[0] for key in file.keys() if key.endswith(".bitmask")}  # noqa: SIM118
            for name in names:
                packed = PackedWeight(*(file.get_tensor(f"{name}.{suffix}") for suffix in suffixes))
                weight, mask = unpack(packed, stored.shapes[name], name, stored.encoding)
                found[name] = (mask, weight)
        tensors = read_shard(path, config)
        found |= {name: (torch.ones_like(w).bool(), w) for name, w in tensors.items() if name in config.unmasked}
    assert found.keys() == stored.shapes.keys()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file that does not tell about the clock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOG}


class Interrupt(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


def interrupt(base: Path, out: Path, block: int = 2, **options: object) -> Path:
    """Stop a derivation before `block`, as the user does with Ctrl-C; return `OUT.partial`."""

    def stop(stage, done, __):
        if (stage, done) == ("prune", block):
            raise Interrupt

    with pytest.raises(Interrupt):
        derive_tiny(base, out, progress=stop, **options)
    return out.with_name(f"{out.name}.partial")


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
