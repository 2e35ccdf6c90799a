"""How the tensors of a GGUF are called, shaped and permuted, for each architecture that is understood.

llama.cpp stores the rows of llama's query and key projections in another order (its rotary embedding pairs neighbours,
that of transformers pairs halves), and Gemma's norms with one added. Rows are put into either order here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

Change = Literal["none", "query_order", "key_order", "minus_one"]


@dataclass(frozen=True)
class Source:
    """A transformers tensor's GGUF name, its shape, and what has to be undone."""

    name: str
    shape: tuple[int, ...]
    change: Change = "none"


# GGUF name inside a block: transformers name inside a layer.
PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

EMBEDDING, HEAD, FINAL_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING_NAME, HEAD_NAME, FINAL_NORM_NAME = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def tensor_sources(architecture: str, config: dict[str, Any]) -> dict[str, Source]:
    """Return for every tensor of the transformers model where it lies in the GGUF.

    Parameters
    ----------
    architecture
        `general.architecture`: llama, qwen2, qwen3 or gemma3.
    config
        The transformers configuration, as in `config.json`.
    """
    norm_change: Change = "minus_one" if architecture == "gemma3" else "none"
    vocabulary = (config["vocab_size"], config["hidden_size"])
    sources = {
        EMBEDDING_NAME: Source(EMBEDDING, vocabulary),
        FINAL_NORM_NAME: Source(FINAL_NORM, vocabulary[1:], norm_change),
    }
    for layer in range(config["num_hidden_layers"]):
        for gguf_name, name, shape, change in _layer(architecture, config, norm_change):
            sources[f"model.layers.{layer}.{name}"] = Source(f"blk.{layer}.{gguf_name}", shape, change)
    if not config["tie_word_embeddings"]:
        sources[HEAD_NAME] = Source(HEAD, vocabulary)
    return sources


def undo(tensor: torch.Tensor, change: Change, config: dict[str, Any]) -> torch.Tensor:
    """Return the rows of a llama query or key projection (weight or bias) in the order of transformers.

    In the file, row 2i + j of a head is row j * head_dim / 2 + i of transformers.
    """
    return _swap(tensor, change, config, lambda half: (half, 2))


def redo(tensor: torch.Tensor, change: Change, config: dict[str, Any]) -> torch.Tensor:
    """Return rows in the order of transformers in that of the file: the inverse of `undo`."""
    return _swap(tensor, change, config, lambda half: (2, half))


def _swap(
    tensor: torch.Tensor, change: Change, config: dict[str, Any], split: Callable[[int], tuple[int, int]]
) -> torch.Tensor:
    """Split the rows of each head in two dimensions and swap these."""
    if change not in ("query_order", "key_order"):
        return tensor
    heads = config["num_attention_heads" if change == "query_order" else "num_key_value_heads"]
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, *split(half), *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _layer(
    architecture: str, config: dict[str, Any], norm_change: Change
) -> Iterator[tuple[str, str, tuple[int, ...], Change]]:
    """Yield GGUF name, transformers name, shape and change for each tensor of one layer."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    outputs = {"attn_q": queries, "attn_k": keys, "attn_v": keys}
    outputs |= dict.fromkeys(["ffn_gate", "ffn_up"], config["intermediate_size"])
    outputs |= dict.fromkeys(["attn_output", "ffn_down"], hidden)
    inputs = dict.fromkeys(PROJECTIONS, hidden) | {"attn_output": queries, "ffn_down": config["intermediate_size"]}
    changes: dict[str, Change] = {"attn_q": "query_order", "attn_k": "key_order"} if architecture == "llama" else {}
    biased = biased_projections(architecture, config)
    for gguf_name, name in PROJECTIONS.items():
        change = changes.get(gguf_name, "none")
        yield f"{gguf_name}.weight", f"{name}.weight", (outputs[gguf_name], inputs[gguf_name]), change
        if gguf_name in biased:
            yield f"{gguf_name}.bias", f"{name}.bias", (outputs[gguf_name],), change
    for gguf_name, name in (GEMMA_NORMS if architecture == "gemma3" else NORMS).items():
        yield f"{gguf_name}.weight", f"{name}.weight", (hidden,), norm_change
    if architecture in ("qwen3", "gemma3"):
        for gguf_name, name in HEAD_NORMS.items():
            yield f"{gguf_name}.weight", f"{name}.weight", (head,), norm_change


def biased_projections(architecture: str, config: dict[str, Any]) -> set[str]:
    """Return the GGUF names of the projections that have a bias."""
    if architecture == "qwen2":
        return {"attn_q", "attn_k", "attn_v"}
    biased = {"attn_q", "attn_k", "attn_v", "attn_output"} if config.get("attention_bias") else set()
    return biased | ({"ffn_gate", "ffn_up", "ffn_down"} if config.get("mlp_bias") else set())
