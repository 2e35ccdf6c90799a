"""Tiny models that run natively, and what they are compared with."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secateur.config import make_recipe
from secateur.models.source import resolve_model
from secateur.pruning.derive import derive_recipe
from secateur.runtime.engine import open_native

NATIVE = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS = {
    **{family: (family, {}) for family in NATIVE},
    "llama3 scaling": ("llama", {"rope_parameters": LLAMA3}),
    "linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "large epsilon": ("llama", {"rms_norm_eps": 0.1}),
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one head for each": ("llama", {"num_key_value_heads": 4}),
    "one head for all": ("qwen2", {"num_attention_heads": 12, "num_key_value_heads": 1, "hidden_size": 192}),
    "wide heads": ("qwen3", {"head_dim": 48}),
}


def reference_logits(folder: Path, token_ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].numpy()


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Keys and values in half precision and bf16 activations leave about three digits."""
    return bool(np.abs(found - expected).max() < 0.02 * np.abs(expected).max())


def native(folder: Path, threads: int = 2):
    return open_native(resolve_model(str(folder)), threads=threads)


def sub_model(base: Path, text: Path, output: Path, **options) -> Path:
    recipe = make_recipe(
        {"model": str(base), "for": str(text), "samples": 4, "sequence_length": 32, "method": "wanda", **options}
    )
    derive_recipe(recipe, output=output)
    return output


def changed_weights(folder: Path, target: Path, change, **config) -> Path:
    """Copy a model with other tensors, and other entries in its config."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**content, **config}))
    return target
