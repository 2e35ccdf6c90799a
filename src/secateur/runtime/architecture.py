"""Which decoders the native engine computes, read from config.json: sizes, rotary embedding, names of weights.

Families of the llama shape: llama, mistral, qwen2, qwen3. Anything that changes what a block computes and is not
understood here is refused by name. Needs neither torch nor transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class NotNativeError(ModelError):
    """A model that the native engine does not compute; transformers may."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """What the engine has to know of a model.

    Attributes
    ----------
    family
        `model_type` of config.json.
    sliding_window
        Positions that a token sees, itself included; 0 means all.
    max_positions
        Tokens of the longest text that the model knows.
    tied
        Whether the embedding is the head, where none is stored.
    biases
        Projections that have a bias.
    head_norms
        Whether queries and keys are normed by head.
    inverse_frequencies
        float32 [head_dim / 2] of the rotary embedding (Su et al. 2021), scaling applied.
    """

    family: str
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    sliding_window: int
    max_positions: int
    norm_epsilon: float
    tied: bool
    biases: frozenset[str]
    head_norms: bool
    inverse_frequencies: NDArray[np.float32]


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the content of a config.json.

    Raises
    ------
    NotNativeError
        When the model is of another family, or has a property that the engine does not compute.
    ModelError
        When a size is missing or cannot be.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise NotNativeError(f"models of type {family!r} are not run natively; natively run are {', '.join(FAMILIES)}")
    _refuse_unknown(config)
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    if not config.get("head_dim") and family in {"mistral", "qwen3"}:
        raise NotNativeError("config.json does not say head_dim")
    head_dim = _size(config, "head_dim") if config.get("head_dim") else hidden // heads
    if head_dim % 16:
        raise NotNativeError(f"heads of {head_dim} entries are not run natively: a multiple of 16 is needed")
    return Architecture(
        family=str(family),
        blocks=_size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads"),
        head_dim=head_dim,
        hidden=hidden,
        intermediate=_size(config, "intermediate_size"),
        vocabulary=_size(config, "vocab_size"),
        sliding_window=_sliding_window(config),
        max_positions=_size(config, "max_position_embeddings"),
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings")),
        biases=_biases(config),
        head_norms=family == "qwen3",
        inverse_frequencies=_inverse_frequencies(config, head_dim),
    )


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise NotNativeError(f"the activation {activation!r} is not run natively")
    if config.get("num_experts") or config.get("num_local_experts"):
        raise NotNativeError("mixtures of experts are not run natively")
    if (factor := config.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise NotNativeError(f"a partial rotary embedding (factor {factor!r}) is not run natively")


def _biases(config: Mapping[str, Any]) -> frozenset[str]:
    """Return which projections have a bias: the config decides, as in transformers, not what a file happens to hold."""
    family = config["model_type"]
    found = {"query", "key", "value"} if family == "qwen2" else set()
    if family in {"llama", "qwen3"} and config.get("attention_bias"):
        found |= {"query", "key", "value", "output"}
    if family == "llama" and config.get("mlp_bias"):
        found |= {"gate", "up", "down"}
    return frozenset(found)


def _sliding_window(config: Mapping[str, Any]) -> int:
    """Return the window that all blocks share; qwen says apart whether it uses one."""
    window = config.get("sliding_window", 4096 if config["model_type"] == "mistral" else None)
    if not window or (config["model_type"] != "mistral" and not config.get("use_sliding_window", False)):
        return 0
    listed = config.get("layer_types") or []
    if not isinstance(listed, list):
        raise ModelError(f"config.json has layer_types {listed!r}, which are no list; fetch the model again")
    kinds = {str(kind) for kind in listed}
    if kinds == {"full_attention"}:
        return 0
    if config["model_type"] != "mistral" and kinds != {"sliding_attention"}:
        raise NotNativeError("blocks that differ in their sliding window are not run natively")
    return _size({"sliding_window": window}, "sliding_window")


def _inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        frequencies = _scaled_frequencies(config, head_dim)
    if not np.isfinite(frequencies).all():
        raise ModelError("config.json has rotary parameters that give infinite frequencies; fetch the model again")
    return frequencies


def _scaled_frequencies(config: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    # In the order in which transformers looks: rope_scaling first, and from the top level what it does not say.
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json has rope_parameters {given!r}, which are no mapping; fetch the model again")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise NotNativeError("rotary parameters that differ between blocks are not run natively")
    rope = {
        "rope_theta": config.get("rope_theta"),
        "original_max_position_embeddings": config.get("max_position_embeddings"),
        **{key: value for key, value in given.items() if value is not None},
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = _number(rope, "rope_theta", 10000.0)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers: NDArray[np.float32] = np.power(np.float32(theta), exponents, dtype=np.float32)
    frequencies: NDArray[np.float32] = np.reciprocal(powers)
    if kind == "default":
        return frequencies
    if kind == "linear":
        linear: NDArray[np.float32] = frequencies / np.float32(_number(rope, "factor", None))
        return linear
    if kind == "llama3":
        return _llama3(frequencies, rope)
    raise NotNativeError(f"the rotary scaling {kind!r} is not run natively; default, linear and llama3 are")


def _llama3(frequencies: NDArray[np.float32], rope: Mapping[str, Any]) -> NDArray[np.float32]:
    """Scale as Llama 3.1 does: long waves by the factor, short ones not, those between smoothly."""
    factor = _number(rope, "factor", None)
    low, high = _number(rope, "low_freq_factor", None), _number(rope, "high_freq_factor", None)
    context = _number(rope, "original_max_position_embeddings", None)
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > context / low, frequencies / factor, frequencies)
    result: NDArray[np.float32] = np.where(
        (wavelengths <= context / low) & (wavelengths >= context / high), between, scaled
    ).astype(np.float32)
    return result


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if value is None:
        raise NotNativeError(f"config.json does not say {key}")
    if type(value) is not int or not 0 < value < 2**24:
        raise ModelError(f"config.json has {key} {value!r}, expected a positive number; fetch the model again")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None) -> float:
    value = config.get(key)
    value = default if value is None else value
    # What is no normal float32 would be 0 or infinity in the engine.
    if isinstance(value, bool) or not isinstance(value, int | float) or not SMALLEST <= value <= LARGEST:
        raise ModelError(f"config.json has {key} {value!r}, expected a positive number; fetch the model again")
    return float(value)
