"""Ways to damage a model or a sub-model; each takes a whole folder and returns a damaged copy of it."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MODEL = "model.safetensors"
Header = dict[str, Any]


def copied(source: Path, target: Path) -> Path:
    """Return a copy of a folder."""
    shutil.copytree(source, target)
    return target


def replaced(source: Path, target: Path, file: str, content: str | bytes | None) -> Path:
    """Put other content into a file, or remove it."""
    copied(source, target)
    if content is None:
        (target / file).unlink()
    else:
        (target / file).write_bytes(content.encode() if isinstance(content, str) else content)
    return target


def with_json(source: Path, target: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a JSON file in place."""
    content = json.loads((source / file).read_text())
    change(content)
    return replaced(source, target, file, json.dumps(content))


def truncated(source: Path, target: Path, file: str = MODEL, keep: float = 0.6) -> Path:
    """Cut a file short."""
    content = (source / file).read_bytes()
    return replaced(source, target, file, content[: int(len(content) * keep)])


def with_weight(source: Path, target: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> Path:
    """Change one tensor of model.safetensors, or remove it where `change` returns None."""
    tensors = load_file(source / MODEL)
    new = change(tensors.pop(name))
    if new is not None:
        tensors[name] = new.contiguous()
    copied(source, target)
    save_file(tensors, target / MODEL, {"format": "pt"})
    return target


def with_nan(source: Path, target: Path, name: str) -> Path:
    """Put one NaN into a weight."""

    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[7] = torch.nan
        return tensor

    return with_weight(source, target, name, change)


def with_header(source: Path, target: Path, change: Callable[[Header], object]) -> Path:
    """Change the header of model.safetensors and leave the bytes after it as they are."""
    content = (source / MODEL).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    return replaced(source, target, MODEL, struct.pack("<Q", len(raw)) + raw + content[8 + length :])


def with_set_bytes(source: Path, target: Path, suffix: str, shard: str = "model-00001-of-00004.safetensors") -> Path:
    """Set all bits in the first eight bytes of a packed weight's `bitmask`, `values` or `row_offsets`."""
    content = bytearray((source / shard).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    start = 8 + length + min(entry["data_offsets"][0] for name, entry in header.items() if name.endswith(f".{suffix}"))
    content[start : start + 8] = b"\xff" * 8
    return replaced(source, target, shard, bytes(content))
