"""A streaming writer of GGUF files: one tensor in memory at a time, the same bytes for the same input.

The bytes of the header are the business of the `gguf` package. Nothing here knows what a tensor or a key means.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from secateur.models.gguf_file import Value


@dataclass(frozen=True)
class LazyBlocks:
    """A tensor that is made when its turn to be written comes.

    Attributes
    ----------
    shape
        As torch has it ([out, in]).
    kind
        How it is stored.
    load
        Called once, without arguments; returns the stored bytes, uint8 [rows, bytes of a row].
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    load: Callable[[], np.ndarray]


def write_gguf(path: Path, architecture: str, metadata: Mapping[str, Value], tensors: Mapping[str, LazyBlocks]) -> None:
    """Write a GGUF file.

    Parameters
    ----------
    path
        The file; it is neither written beside nor synced, see `files.new_file`.
    architecture
        `general.architecture`.
    metadata
        Whole numbers become uint32, fractions float32; lists hold entries of one type, empty ones are left out.
    tensors
        By their names in the file, in the order in which they are written.

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If `load` returns another number of bytes than the shape asks for.
    """
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        # The package takes a shape of bytes where the array is uint8, and one of elements otherwise.
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), _size(tensor), raw_dtype=tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            data = tensor.load()
            if data.nbytes != _size(tensor):
                raise ValueError(f"{name}: {data.nbytes} bytes for {tensor.kind.name} {list(tensor.shape)}")
            writer.write_tensor_data(data)
    finally:
        writer.close()


def _size(tensor: LazyBlocks) -> int:
    block, size = GGML_QUANT_SIZES[tensor.kind]
    return int(prod(tensor.shape[:-1]) * (tensor.shape[-1] // block) * size)


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
