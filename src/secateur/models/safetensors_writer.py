"""A streaming writer of safetensors files: deterministic bytes, aligned tensors, one tensor in memory at a time.

The format is eight bytes of header length (little endian), a JSON header, and the tensors' bytes without holes. The
official writer takes every tensor at once; this one takes each when its turn comes. It does not read files, and it
does not shard them.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from secateur.errors import OutputError
from secateur.files import atomic_file

ALIGNMENT = 64

DTYPE_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Tensor = torch.Tensor | np.ndarray


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when its turn to be written comes.

    Parameters
    ----------
    shape
        The shape that `load` will return.
    dtype
        The torch dtype that `load` will return.
    load
        Called once, without arguments; returns the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | Lazy], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` to `path`, which appears only when it is whole.

    Tensors whose size is a multiple of 64 bytes come first, in the order given, so that each starts on a 64-byte
    boundary of the file; the rest follows with the largest elements first, each aligned to its element size.
    The same input always gives the same bytes.

    Parameters
    ----------
    path
        The file to write; an existing one is replaced.
    tensors
        Name to tensor (any shape, also empty) or to a `Lazy` one.
    metadata
        Strings for the header's `__metadata__`.

    Raises
    ------
    OutputError
        If the file cannot be written (a full disk, no permission).
    ValueError
        If a dtype has no safetensors code, or a `Lazy` returns another shape or dtype than it said.
    """
    entries = _layout(tensors)
    try:
        with atomic_file(path) as partial, partial.open("wb") as file:
            file.write(_header(entries, metadata))
            for entry in entries:
                file.write(_bytes_of(entry, tensors[entry.name]))
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({error.strerror or error}); free some space or choose another path"
        ) from error


def _layout(tensors: Mapping[str, Tensor | Lazy]) -> list[_Entry]:
    """Return the tensors in file order with their offsets behind the header."""
    described = []
    for name, tensor in tensors.items():
        dtype = _torch_dtype(tensor.dtype)
        if dtype not in DTYPE_CODES:
            raise ValueError(f"{name}: safetensors files of ours have no code for {dtype}")
        shape = tuple(int(size) for size in tensor.shape)
        described.append((name, shape, dtype, prod(shape) * dtype.itemsize))
    aligned = [item for item in described if item[3] % ALIGNMENT == 0]
    rest = sorted((item for item in described if item[3] % ALIGNMENT), key=lambda item: -item[2].itemsize)
    entries = []
    offset = 0
    for name, shape, dtype, size in [*aligned, *rest]:
        entries.append(_Entry(name, shape, dtype, offset, offset + size))
        offset += size
    return entries


def _header(entries: list[_Entry], metadata: Mapping[str, str] | None) -> bytes:
    """Return the length and the JSON header, padded with spaces so that the data begins on 64 bytes."""
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPE_CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(entry: _Entry, source: Tensor | Lazy) -> memoryview:
    """Return the tensor's bytes, without a copy where it is contiguous and on the CPU."""
    tensor = source.load() if isinstance(source, Lazy) else source
    if tuple(tensor.shape) != entry.shape or _torch_dtype(tensor.dtype) != entry.dtype:
        raise ValueError(f"{entry.name}: said {entry.dtype} {entry.shape}, is {tensor.dtype} {tuple(tensor.shape)}")
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.detach().cpu().contiguous()
        # numpy has no bfloat16; the bits are the same.
        array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    else:
        array = np.ascontiguousarray(tensor)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.reshape(-1).view(np.uint8).data


def _torch_dtype(dtype: torch.dtype | np.dtype) -> torch.dtype:
    """Return the torch dtype of a torch or numpy dtype."""
    if isinstance(dtype, torch.dtype):
        return dtype
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError as error:
        raise ValueError(f"safetensors files of ours have no code for {dtype}") from error
