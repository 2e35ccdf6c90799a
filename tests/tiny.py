"""Tiny decoders with random weights and a byte-level tokenizer, built from configs without a network.

They have the structure of the real families (grouped keys and values, sliding windows, biases, tied embeddings) in
fewer than two hundred thousand parameters. Their weights are wide enough that outputs differ clearly between tokens,
and the feed-forward width is no multiple of 64.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 384
BOS, EOS, PAD = 256, 257, 258
SPECIALS = ["<bos>", "<eos>", "<pad>"]

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}

_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

# What each family adds to the common sizes. The key is the `model_type` of transformers, but for gemma3.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 32},
    "qwen2": {"tie_word_embeddings": True},  # has biases on q, k and v
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, "layer_types": _LAYERS},
    "gemma3": {"sliding_window": 32, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, "layer_types": _LAYERS},
}

# Families that only transformers runs, for what is to hold for any architecture.
OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {},  # q, k and v in one weight, gate and up in another
    "starcoder2": {"tie_word_embeddings": True, "use_bias": True},
    "olmo": {},  # norms without weights
    "gpt_bigcode": {"tie_word_embeddings": True, "n_inner": 160},  # one key and value for all heads, learnt positions
    "cohere": {"tie_word_embeddings": True},  # parallel blocks
    "opt": {"tie_word_embeddings": True, "ffn_dim": 160, "word_embed_proj_dim": 64},
    "gemma": {"tie_word_embeddings": True},
}

_MODEL_TYPES = {"gemma3": "gemma3_text", "gemma3_text": "gemma3_text"}


def tiny_config(family: str, **changes: Any) -> Any:
    """Return the config of a tiny model of `family`; `changes` override single fields."""
    own = {**FAMILIES, **OTHER_FAMILIES}["gemma3" if family == "gemma3_text" else family]
    return AutoConfig.for_model(_MODEL_TYPES.get(family, family), **{**_COMMON, **own, **changes})


def tiny_model(family: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return a tiny model in evaluation mode, the same for the same `family` and `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    # The head is scaled so that next-token probabilities spread over about three decades.
                    outward = "embed" in name or "lm_head" in name
                    parameter.normal_(0.0, 0.25 if outward else 1.2 / parameter.shape[1] ** 0.5)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.3)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)  # norm scales that differ by channel
            if family.startswith("gemma"):  # embeddings are scaled up inside, so tied ones would echo the input token
                model.model.embed_tokens.weight.mul_(0.3)
                model.model.norm.weight.add_(2.0)
    model.generation_config.eos_token_id = EOS
    model.generation_config.bos_token_id = BOS
    model.generation_config.pad_token_id = PAD
    model.generation_config.do_sample = False
    for parameter in model.parameters():
        parameter.data = parameter.data.to(
            dtype
        )  # buffers keep float32, as `from_pretrained` leaves rotary frequencies
    return model.eval()


def tiny_tokenizer(*, add_bos: bool = False, more_specials: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte: ids 0-255 in byte-level alphabet order, then the specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIALS, *more_specials])
    if add_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("bos_token", "eos_token", "pad_token"), SPECIALS, strict=True)),
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def save_tiny(
    folder: str | Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any
) -> Path:
    """Save a tiny model and the tokenizer as a Hugging Face folder with safetensors; return the folder."""
    folder = Path(folder)
    tiny_model(family, seed, dtype=dtype, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
