"""The bytes of a GGUF file: its metadata, its table of tensors, and one tensor at a time as bfloat16.

The reader of the `gguf` package makes several arrays for every string of a token list, which takes seconds and
hundreds of megabytes for a vocabulary of 150,000, and it trusts the lengths that a damaged file states. So the header
is read here, with bounds; the arithmetic of the quantised types stays with that package. Nothing here knows what a
tensor or a key means.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from secateur.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9

# Value type in the file: struct code. bool is a byte.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# Elements that are dequantised at once: 16 MB in float32, so that memory stays small beside the tensor itself.
CHUNK_ELEMENTS = 1 << 22

Value = bool | int | float | str | list["Value"]


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies; shape is torch's ([out, in]), offset counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the last dimension."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(self.shape[-1] // block * size)

    @property
    def bits_per_weight(self) -> float:
        """Bits for each element: the more, the more precise."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return float(8 * size / block)


class GGUFFile:
    """A GGUF file whose header has been read and checked.

    Raises
    ------
    ModelError
        If the file is not a GGUF, is of an unknown version, or is shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            with path.open("rb") as file:
                if file.read(4) != MAGIC:
                    raise ModelError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._read_header(_Cursor(data, len(MAGIC)), len(data))
        except OSError as error:
            raise ModelError(f"cannot read {path} ({error.strerror or error})") from error
        except (_DamagedError, UnicodeDecodeError, OverflowError) as error:
            raise ModelError(f"{path} is a damaged or incomplete GGUF file ({error}); fetch it again") from error

    def rows(self, tensor: GGUFTensor, begin: int, end: int) -> np.ndarray:
        """Return rows `begin` to `end` of a tensor as float32 [end - begin, last dimension]."""
        count = (end - begin) * tensor.row_bytes
        packed = np.fromfile(self.path, np.uint8, count, offset=tensor.offset + begin * tensor.row_bytes)
        if packed.size != count:
            raise ModelError(f"{self.path} became shorter while it was read; fetch it again")
        values: np.ndarray = dequantize(packed.reshape(end - begin, tensor.row_bytes), tensor.kind)
        return values.astype(np.float32, copy=False)

    def row_chunks(self, tensor: GGUFTensor) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 rows) until the tensor is done; a one-dimensional tensor is one row."""
        count = prod(tensor.shape[:-1])
        step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
        for begin in range(0, count, step):
            yield begin, self.rows(tensor, begin, min(begin + step, count))

    def bfloat16(self, tensor: GGUFTensor, add: float = 0.0) -> torch.Tensor:
        """Return the whole tensor plus `add` (added in float32), rounded to bfloat16."""
        out = torch.empty(prod(tensor.shape[:-1]), tensor.shape[-1], dtype=torch.bfloat16)
        for begin, values in self.row_chunks(tensor):
            # A float32 tensor comes as a read-only view of the file's bytes; torch wants a writable one.
            out[begin : begin + len(values)] = torch.from_numpy(np.add(values, np.float32(add)))
        return out.reshape(tensor.shape)

    def _read_header(self, cursor: "_Cursor", size: int) -> None:
        version = cursor.scalar("I")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise ModelError(f"{self.path} is GGUF version {version}; little-endian versions {known} can be read")
        tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(key_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise _DamagedError(f"general.alignment is {alignment!r}")
        table = [_tensor_entry(cursor) for _ in range(tensor_count)]
        start = -(-cursor.position // alignment) * alignment
        for entry in table:
            tensor = GGUFTensor(entry.name, entry.shape, entry.kind, start + entry.offset)
            end = tensor.offset + prod(tensor.shape[:-1]) * tensor.row_bytes
            if end > size:
                raise _DamagedError(f"tensor {tensor.name} ends at byte {end:,}, the file at {size:,}")
            self.tensors[tensor.name] = tensor


class _DamagedError(Exception):
    """What is wrong with the bytes; becomes a `ModelError` that names the file."""


class _Cursor:
    """Reads little-endian values one after another and never past the end."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise _DamagedError(f"the header goes on past the last byte, {len(self.data):,}")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    # The file decides the type by `code`, so it cannot be told to the type checker.
    def scalar(self, code: str) -> int:
        number: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return number

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Value:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise _DamagedError(f"value type {kind} at byte {self.position:,} is unknown")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in SCALARS:
            code = SCALARS[item]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        if item != STRING:
            raise _DamagedError(f"array of value type {item} at byte {self.position:,} is unknown")
        return [self.string() for _ in range(count)]


def _tensor_entry(cursor: _Cursor) -> GGUFTensor:
    """Read one line of the table of tensors; its offset still counts from the start of the data."""
    name = cursor.string()
    dimensions = cursor.scalar("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _DamagedError(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
    number = cursor.scalar("I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ModelError(f"tensor {name} has quantisation type {number}, unknown to the gguf package") from None
    block = GGML_QUANT_SIZES[kind][0]
    if 0 in shape or shape[-1] % block:
        raise _DamagedError(f"tensor {name} has shape {list(shape)} and type {kind.name}, whose blocks have {block}")
    return GGUFTensor(name, shape, kind, cursor.scalar("Q"))
