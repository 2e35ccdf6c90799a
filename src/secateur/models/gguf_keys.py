"""The metadata of a GGUF from a transformers configuration: what `gguf_config` reads, written.

For the families whose files llama.cpp computes as transformers does. What it would compute otherwise is refused by
name; llama.cpp itself would run such a file without a word.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import AutoConfig

from secateur.errors import ModelError
from secateur.models.gguf_config import llama3_factors
from secateur.models.gguf_file import Value

# transformers model type: GGUF architecture.
WRITTEN = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# What may stand in a rotary scaling beside its type and theta, with the only values that llama.cpp would use.
_ROPE_KEYS: dict[str, dict[str, tuple[object, ...]]] = {
    "default": {},
    "linear": {},
    "llama3": {},
    "yarn": {"beta_fast": (32, None), "beta_slow": (1, None), "attention_factor": (None,), "mscale": (None,),
             "mscale_all_dim": (None,), "truncate": (True, None)},
}  # fmt: skip

_SIZES = (
    "max_position_embeddings", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json of one of `WRITTEN` with every default filled in, as transformers reads it.

    Raises
    ------
    ModelError
        If the model is of another family, or has a property that llama.cpp does not compute in this one.
    """
    kind = config.get("model_type")
    if kind not in WRITTEN:
        raise ModelError(
            f"a model of type {kind!r} cannot be written as a GGUF, only {', '.join(WRITTEN)}; "
            "export it with `--format dense`, and convert that folder with llama.cpp's own converter"
        )
    try:
        full: dict[str, Any] = AutoConfig.for_model(**config).to_dict()
    except Exception as error:  # transformers raises anything here
        raise ModelError(
            f"config.json describes no {kind} that transformers knows ({error}); fetch it again"
        ) from error
    _check_sizes(full)
    full["head_dim"] = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    _refuse(full)
    return full


def model_metadata(config: Mapping[str, Any], name: str) -> dict[str, Value]:
    """Return the keys of a GGUF that tell about the model, apart from its vocabulary; `config` is a `full_config`."""
    architecture = WRITTEN[config["model_type"]]
    rope = config["rope_parameters"]
    keys: dict[str, Value] = {
        "context_length": _context_length(config),
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = original
    if config["model_type"] == "mistral" and config.get("sliding_window"):
        keys["attention.sliding_window"] = config["sliding_window"]  # llama.cpp knows none here, but our reader does
    return {"general.type": "model", "general.name": name} | {
        f"{architecture}.{key}": value for key, value in keys.items()
    }


def _context_length(config: Mapping[str, Any]) -> int:
    """Return how far llama.cpp computes as transformers does: it would let tokens of a Mistral see past the window."""
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    longest: int = config["max_position_embeddings"]
    return longest if window is None else min(longest, window)


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """Return the tensor `rope_freqs.weight`, float32 [head_dim / 2], of a model scaled as Llama 3.1 is."""
    rope = config["rope_parameters"]
    if rope["rope_type"] != "llama3":
        return None
    return llama3_factors(rope, config["head_dim"] // 2).astype(np.float32)


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Raise `ModelError` for numbers that no model has, which a GGUF could not hold or llama.cpp would stumble over."""
    optional = [key for key in ("head_dim", "sliding_window") if config.get(key) is not None]
    rope = config.get("rope_parameters") or {}
    scaling = {key: rope[key] for key in ("rope_theta", "factor") if rope.get(key) is not None}
    for key in (*_SIZES, *optional):
        if type(config.get(key)) is not int or not 0 < config[key] < 2**31:
            raise ModelError(f"config.json has {key} {config.get(key)!r}, expected a positive number; fetch it again")
    for key, value in {"rms_norm_eps": config.get("rms_norm_eps"), **scaling}.items():
        if not isinstance(value, int | float) or not 0 < value < float(np.finfo(np.float32).max):
            raise ModelError(f"config.json has {key} {value!r}, expected a positive number; fetch it again")


def _refuse(config: Mapping[str, Any]) -> None:
    """Refuse what changes the outputs of a block and has no place in a GGUF of this family."""
    kind = config["model_type"]
    if (activation := config.get("hidden_act")) not in ("silu", "swish"):
        raise _not_written(kind, f"the activation {activation!r}")
    if kind == "qwen3" and config.get("attention_bias"):
        raise _not_written(kind, "biases in its attention")
    if kind.startswith("qwen") and "sliding_attention" in (config.get("layer_types") or ()):
        raise _not_written(kind, "a sliding window")
    rope = config.get("rope_parameters") or {}
    scaling = rope.get("rope_type")
    if scaling not in _ROPE_KEYS:
        raise _not_written(kind, f"the rotary scaling {scaling!r}")
    if (part := rope.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise _not_written(kind, f"a partial rotary embedding (factor {part!r})")
    for key, known in _ROPE_KEYS[scaling].items():
        if rope.get(key) not in known:
            raise _not_written(kind, f"a rotary scaling {scaling!r} with {key} {rope[key]!r}")


def _not_written(kind: str, what: str) -> ModelError:
    return ModelError(
        f"this {kind} has {what}, which llama.cpp does not compute for this family; export it with `--format dense`"
    )
