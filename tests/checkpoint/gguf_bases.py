"""Tiny base models with tokenizers that a GGUF can hold."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch

from secateur.models.gguf_file import GGUFFile
from secateur.models.gguf_tokenizer import write_tokenizer
from tests.models.gguf_files import add_vocabulary
from tests.tiny import tiny_model


def save_base(
    folder: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, pre: str = "smollm", **changes: Any
) -> Path:
    """Save a tiny model with a byte-level tokenizer of 263 tokens for its 384 rows, three of them merged."""
    tiny_model(family, dtype=dtype, **changes).save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "tokenizer.gguf", "llama")
    writer.add_context_length(256)
    add_vocabulary(writer, pre)
    return _written(writer, folder)


# Joined from the left, and words with and without the visible space before them.
PIECES = ["▁▁", "▁▁▁▁", "de", "▁d", "ef", "▁de", "def", "▁def", "re", "ret", "▁re", "▁ret", "12", "'t"]
CHARACTERS = sorted({*"abdefrtx12'._B\u2581", *"é中"})


def save_sentencepiece(folder: Path, *, prefix: str = "none") -> Path:
    """Give a model a sentencepiece tokenizer; bytes stand for what it has no token for.

    `prefix` is how a text gets a space before it: `none`, `metaspace` (but before a space) or `prepended` (always, in
    the form of older files).
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, *CHARACTERS]
    writer = gguf.GGUFWriter(folder / "tokenizer.gguf", "llama")
    writer.add_context_length(256)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(prefix == "metaspace")
    _written(writer, folder)
    if prefix == "prepended":
        content = json.loads((folder / "tokenizer.json").read_text())
        steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        content |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def _written(writer: gguf.GGUFWriter, folder: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write_tokenizer(GGUFFile(folder / "tokenizer.gguf"), folder)
    (folder / "tokenizer.gguf").unlink()
    return folder
