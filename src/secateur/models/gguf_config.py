"""`config.json` and `generation_config.json` from the metadata of a GGUF.

Written by hand for the few architectures that are understood, because building them through transformers reads the
whole vocabulary several times. What is not understood (a rotary scaling, a mixture of experts) is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from secateur.errors import ModelError
from secateur.models.gguf_file import GGUFFile, Value
from secateur.models.gguf_names import EMBEDDING, HEAD, ROPE_FACTORS

# GGUF architecture: transformers model type and class.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

# Names that end a text or a turn, whatever the file calls its one end-of-sequence token.
END_TOKENS = {
    *("<|endoftext|>", "<|im_end|>"),  # Qwen, SmolLM
    *("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),  # Llama 3
    *("</s>", "<eos>", "<end_of_turn>"),  # Mistral, Gemma
}
CONTROL = 3  # the token type

GEMMA_LOCAL_THETA = 10_000.0
GEMMA_PATTERN = 6
GEMMA_27B_LAYERS = 62


class Metadata:
    """A GGUF's keys below its architecture, read with their types checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = self._text("general.architecture")

    def number(self, key: str, default: float | None = None) -> float:
        """Return the number at `key`; raises `ModelError` if it is missing and has no default."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # some converters write one value for each layer
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{self.file.path} has {value!r} for {self.architecture}.{key}; one number is needed")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Return the positive whole number at `key`."""
        value = self.number(key, default)
        if value != int(value) or value <= 0:
            raise ModelError(f"{self.file.path} has {value!r} for {self.architecture}.{key}; it must be positive")
        return int(value)

    def get(self, key: str, default: Value | None = None) -> Value | None:
        """Return what stands at `key` below the architecture, or `default`."""
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def token(self, key: str) -> int | None:
        """Return the id at `tokenizer.ggml.KEY_token_id`, if there is one inside the vocabulary."""
        value = self.file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None:
            return None
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(value, int) or not isinstance(tokens, list) or not 0 <= value < len(tokens):
            raise ModelError(f"{self.file.path} names {value!r} as its {key} token, which is not in its vocabulary")
        return value

    def _text(self, key: str) -> str:
        value = self.file.metadata.get(key)
        if not isinstance(value, str):
            raise ModelError(f"{self.file.path} has {value!r} for {key}; it is not a whole language model")
        return value


def build_config(file: GGUFFile) -> dict[str, Any]:
    """Return the transformers configuration of a GGUF; `tie_word_embeddings` says whether the file has no head.

    Raises
    ------
    ModelError
        If the architecture or one of its options is not understood, or a key is missing.
    """
    metadata = Metadata(file)
    architecture = metadata.architecture
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{file.path} has the architecture {architecture!r}; GGUF files of {known} can be read, "
            "other models as a Hugging Face folder"
        )
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(f"{file.path} is one part of a split GGUF; join the parts first (llama-gguf-split --merge)")
    if metadata.get("expert_count"):
        raise ModelError(f"{file.path} is a mixture of experts; give it as a Hugging Face folder instead of a GGUF")
    if EMBEDDING not in file.tensors:
        raise ModelError(f"{file.path} has no tensor {EMBEDDING}; it is not a whole language model")
    if metadata.count("block_count") > len(file.tensors):
        raise ModelError(f"{file.path} has {metadata.count('block_count')} blocks but only {len(file.tensors)} tensors")
    model_type, class_name = ARCHITECTURES[architecture]
    heads, hidden = metadata.count("attention.head_count"), metadata.count("embedding_length")
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "dtype": "bfloat16",
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata, hidden, heads),
        "max_position_embeddings": metadata.count("context_length"),
        "rms_norm_eps": _short(metadata.number("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(metadata),
        "bos_token_id": metadata.token("bos"),
        "eos_token_id": metadata.token("eos"),
        "pad_token_id": metadata.token("padding"),
        "tie_word_embeddings": HEAD not in file.tensors,
        "use_cache": True,
    }
    config |= {"llama": _llama, "qwen2": _qwen, "qwen3": _qwen, "gemma3": _gemma3}[architecture](metadata, config)
    return config


def build_generation_config(file: GGUFFile) -> dict[str, Any]:
    """Return the ids that end a text: the file's own and the well-known ones it marks as control tokens."""
    metadata = Metadata(file)
    ends = {metadata.token(key) for key in ("eos", "eot", "eom")} - {None}
    tokens, kinds = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if isinstance(tokens, list) and isinstance(kinds, list):
        pairs = zip(tokens, kinds, strict=False)
        ends |= {i for i, (token, kind) in enumerate(pairs) if kind == CONTROL and token in END_TOKENS}
    config: dict[str, Any] = {"bos_token_id": metadata.token("bos"), "pad_token_id": metadata.token("padding")}
    # The file's own end comes first, as in the generation configs that models are published with.
    first = metadata.token("eos")
    config["eos_token_id"] = sorted((end for end in ends if end is not None), key=lambda end: (end != first, end))
    return {key: value for key, value in config.items() if value not in (None, [])}


def _head_dim(metadata: Metadata, hidden: int, heads: int) -> int:
    keys = metadata.count("attention.key_length", metadata.count("rope.dimension_count", max(1, hidden // heads)))
    values = metadata.count("attention.value_length", keys)
    rotated = metadata.count("rope.dimension_count", keys)
    if not keys == values == rotated or keys % 2:
        raise ModelError(
            f"{metadata.file.path} has keys of {keys}, values of {values} and {rotated} rotated dimensions; "
            "they must be one even number"
        )
    return keys


def _llama(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    names = metadata.file.tensors
    extra: dict[str, Any] = {
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_down.bias" in names,
    }
    if metadata.get("attention.sliding_window") is None:
        return extra
    # Only Mistral among llama's relatives has one.
    del extra["attention_bias"], extra["mlp_bias"]
    window = metadata.count("attention.sliding_window")
    return extra | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _qwen(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    if metadata.get("attention.sliding_window") is not None:
        name = metadata.architecture
        raise ModelError(f"{metadata.file.path} has a sliding window, which is not understood for {name}")
    return {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None} | (
        {"attention_bias": False} if metadata.architecture == "qwen3" else {}
    )


def _gemma3(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    pattern = metadata.get("attention.sliding_window_pattern", GEMMA_PATTERN)
    if isinstance(pattern, list):
        local = [bool(item) for item in pattern]
    else:
        period = metadata.count("attention.sliding_window_pattern", GEMMA_PATTERN)
        local = [(layer + 1) % period != 0 for layer in range(layers)]
    if len(local) != layers:
        raise ModelError(f"{metadata.file.path} says for {len(local)} layers whether they slide; it has {layers}")
    # llama.cpp takes the scale from the size as well: only the 27B model divides by hidden_size / heads.
    divided = config["hidden_size"] // config["num_attention_heads"]
    capping = metadata.get("final_logit_softcapping")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": divided if layers == GEMMA_27B_LAYERS else config["head_dim"],
        "sliding_window": metadata.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in local],
        "final_logit_softcapping": capping if isinstance(capping, float) and capping > 0 else None,
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.number("rope.freq_base_swa", GEMMA_LOCAL_THETA),
            },
        },
    }


def _rope(metadata: Metadata) -> dict[str, Any]:
    """Return the rotary parameters; raises `ModelError` for a scaling that is not understood."""
    gemma = metadata.architecture == "gemma3"
    theta = metadata.number("rope.freq_base", 1_000_000.0 if gemma else 10_000.0)
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    prefix = f"{metadata.architecture}.rope.scaling."
    keys = {key.removeprefix(prefix) for key in metadata.file.metadata if key.startswith(prefix)}
    kind = metadata.get("rope.scaling.type", "none")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    if kind == "none" and metadata.get("rope.scale_linear") is not None:
        kind = "linear"
    known = {"type", "factor", "finetuned", "original_context_length"}
    if kind not in ("none", "linear", "yarn") or keys - known:
        raise ModelError(
            f"{metadata.file.path} scales its rotary embedding by {kind!r} with {sorted(keys)}, which is not understood"
        )
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        rope["original_max_position_embeddings"] = metadata.count("rope.scaling.original_context_length")
    if ROPE_FACTORS in metadata.file.tensors:
        if rope["rope_type"] != "default":
            raise ModelError(f"{metadata.file.path} scales its rotary embedding twice, which is not understood")
        rope |= _llama3_scaling(metadata, theta)
    return rope


def _llama3_scaling(metadata: Metadata, theta: float) -> dict[str, Any]:
    """Return the Llama 3.1 scaling whose factors are those in the file, or refuse them.

    The file holds one divisor for each rotary frequency. Published models differ only in the largest of them.
    """
    tensor = metadata.file.tensors[ROPE_FACTORS]
    stored = metadata.file.rows(tensor, 0, 1)[0]
    scaling = {"factor": float(stored.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    if tensor.shape[:-1] or not np.allclose(stored, llama3_factors(scaling | {"rope_theta": theta}, stored.size), 1e-3):
        raise ModelError(f"{metadata.file.path} has rotary factors ({ROPE_FACTORS}) that are not those of Llama 3")
    return {"rope_type": "llama3", **scaling}


def llama3_factors(rope: Mapping[str, float], count: int) -> np.ndarray:
    """Return the divisors float64 [count] of the rotary frequencies under Llama 3.1's scaling: `rope_freqs.weight`.

    Long waves are divided by `factor`, short ones by 1, those between smoothly.
    """
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(count) / count)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0.0, 1.0)
    factors: np.ndarray = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors


def _short(value: float) -> float:
    """Return the shortest decimal that is this float32, so that 9.999999747378752e-06 reads 1e-05 again."""
    return float(np.format_float_positional(np.float32(value), unique=True))
