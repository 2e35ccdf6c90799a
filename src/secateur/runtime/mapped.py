"""Safetensors files mapped into memory: arrays that read the file in place, shared by all processes that map it.

Needs neither torch nor transformers. Every number in a header is untrusted: nothing is taken on trust that could make
an array reach outside its file.
"""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.errors import CheckpointError

# NumPy has no bfloat16: its bits are read as uint16.
ITEM_TYPES = {
    "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "I32": np.int32, "I64": np.int64,
    "F16": np.uint16, "BF16": np.uint16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip
UNREAD_TYPES = ("BOOL", "U32", "U64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64")
MAX_HEADER = 100_000_000
MAX_DIMENSIONS = 64  # NumPy's limit; the product of a million huge numbers would take hours


@dataclass(frozen=True, eq=False)
class MappedTensor:
    """A tensor in a mapped file.

    Attributes
    ----------
    dtype
        As safetensors names it, such as `BF16`.
    array
        Its entries, read-only; `BF16` and `F16` as their bits (uint16).
    """

    dtype: str
    array: NDArray[Any]


class MappedFile:
    """One mapped safetensors file; the mapping lives as long as this object or any array of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._memory = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise self._damaged(str(error)) from None
        # Tensors of types that nothing here reads are left out: whoever needs one misses it.
        self.tensors = {
            name: self._tensor(name, entry)
            for name, entry in self._header().items()
            if not isinstance(entry, dict) or entry.get("dtype") not in UNREAD_TYPES
        }

    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self._memory[:8].tobytes(), "little")
        if len(self._memory) < 8 or length > min(len(self._memory) - 8, MAX_HEADER):
            raise self._damaged("its header is longer than the file")
        try:
            header = json.loads(self._memory[8 : 8 + length].tobytes())
        except (ValueError, RecursionError):
            raise self._damaged("its header is not JSON") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        header.pop("__metadata__", None)
        self._data = self._memory[8 + length :]
        return header

    def _tensor(self, name: str, entry: Any) -> MappedTensor:
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            item = np.dtype(ITEM_TYPES[dtype])
            whole = len(shape) <= MAX_DIMENSIONS and all(
                type(number) is int and number >= 0 for number in (*shape, begin, end)
            )
        except (KeyError, TypeError, ValueError):
            raise self._damaged(f"tensor {name!r} is described in a way that is not understood") from None
        size = item.itemsize
        for number in shape:
            size *= number if whole else 0
        if not whole or begin > end or end > len(self._data) or end - begin != size:
            raise self._damaged(f"tensor {name!r} does not fit into it")
        data = self._data[begin:end]
        if data.ctypes.data % item.itemsize:  # allowed by the format, rare: not every processor reads it in place
            data = data.copy()
        try:
            return MappedTensor(dtype, data.view(item).reshape(shape))
        except (ValueError, OverflowError):
            raise self._damaged(f"tensor {name!r} has an impossible shape") from None

    def _damaged(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{str(self.path)!r} cannot be read: {problem}; derive or fetch the model again")
