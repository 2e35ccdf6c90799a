"""Tiny GGUF files, written with the gguf package from tiny transformers models.

Tensor names come from that package's own table and the changes that llama.cpp's converter makes are written forwards
here, so that the tests do not compare our tables with themselves.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import MODEL_ARCH, GGMLQuantizationType, TokenType
from gguf.quants import quantize
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma3_text": MODEL_ARCH.GEMMA3,
}

# 256 bytes, three merges, the specials, and filler up to the model's vocabulary of 384.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["d e", "de f", "1 2"]
TOKENS = [*ALPHABET, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "de", "def", "12"]
TOKENS += [f"[PAD{i}]" for i in range(len(TOKENS), 384)]


def token_types(tokens: list[str]) -> list[int]:
    def kind(token: str) -> int:
        if token.startswith("<|"):
            return TokenType.CONTROL
        if token.startswith("<tool"):
            return TokenType.USER_DEFINED
        return TokenType.UNUSED if token.startswith("[PAD") else TokenType.NORMAL

    return [int(kind(token)) for token in tokens]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    kinds: dict[str, GGMLQuantizationType] | None = None,
    head: torch.Tensor | None = None,
    without: tuple[str, ...] = (),
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    pre: str = "smollm",
) -> Path:
    """Write `model` as GGUF; `kinds` quantises tensors by their GGUF name, `head` adds an output.weight."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.model_type != "gemma3_text":
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "sliding_window", None) and config.model_type in ("mistral", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    for key, value in (keys or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    if "tokenizer" not in without:
        add_vocabulary(writer, pre)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    if head is not None:
        state["lm_head.weight"] = head.detach().float()
    for name, tensor in state.items():
        gguf_name = names.get_name(name, (".weight", ".bias"))
        assert gguf_name is not None, name
        if gguf_name not in without:
            _add_tensor(writer, gguf_name, _as_llama_cpp(name, tensor, config), (kinds or {}).get(gguf_name))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(writer: gguf.GGUFWriter, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(token_types(TOKENS))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(TOKENS.index("<|im_start|>"))
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_pad_token_id(TOKENS.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")


def _as_llama_cpp(name: str, tensor: torch.Tensor, config: Any) -> np.ndarray:
    """Return what llama.cpp's converter stores for a transformers tensor."""
    if config.model_type in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        shape = tensor.shape
        tensor = tensor.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        tensor = tensor + 1
    return tensor.contiguous().numpy()


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: GGMLQuantizationType | None) -> None:
    if kind is None:
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
