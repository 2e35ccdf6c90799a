"""The native kernels: products of packed weights with activations, on numpy arrays.

A thin ctypes binding of csrc/secateur.h. It imports neither torch nor transformers, reads no file and keeps no state
but the library itself, which is loaded when it is first used.
"""

import ctypes
import functools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.errors import CheckpointError, NativeCodeError

LIBRARY = Path(__file__).with_name("_kernels.so")
ABI_VERSION = 4
KINDS = {"bf16": 0, "fp16": 1, "int8": 2, "int4": 3, "nl4": 4}
GROUP_SIZES = (32, 64, 128)
WORD_BITS = 64

Array = NDArray[Any]


class WeightStruct(ctypes.Structure):
    """`sct_weight`."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("bitmask", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("row_offsets", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("values_bytes", ctypes.c_int64),
    )


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "sct_check_weight": (ctypes.c_char_p, [ctypes.POINTER(WeightStruct)]),
    "sct_matmul": (
        ctypes.c_int,
        [ctypes.c_void_p, ctypes.POINTER(WeightStruct), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
    ),
    "sct_unpack_row": (None, [ctypes.POINTER(WeightStruct), ctypes.c_int64, ctypes.c_void_p]),
    "sct_pool_create": (ctypes.c_void_p, [ctypes.c_int]),
    "sct_pool_destroy": (None, [ctypes.c_void_p]),
    "sct_read_memory": (ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]),
    "sct_repeat_product": (
        ctypes.c_int,
        [ctypes.c_void_p, ctypes.POINTER(WeightStruct), ctypes.c_int64, ctypes.c_int],
    ),
    "sct_isa": (ctypes.c_char_p, []),
    "sct_isa_at": (ctypes.c_char_p, [ctypes.c_int]),
    "sct_set_isa": (ctypes.c_int, [ctypes.c_char_p]),
}


@functools.cache
def load_library() -> ctypes.CDLL:
    """Return the shared object, with its functions typed.

    Raises
    ------
    NativeCodeError
        When it was not built, was built from other sources, or SECATEUR_ISA asks for what this processor lacks.
    """
    if not LIBRARY.exists():
        raise NativeCodeError(
            f"the native code is not installed ({LIBRARY} is missing): install a C++ compiler (g++ or clang++) and "
            "install secateur again"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise NativeCodeError(f"the native code cannot be loaded ({error}): install secateur again") from error
    found = library.sct_abi_version()
    if found != ABI_VERSION:
        raise NativeCodeError(
            f"the native code in {LIBRARY} has ABI version {found}, expected {ABI_VERSION}: install secateur again"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    wanted = os.environ.get("SECATEUR_ISA")
    if wanted and library.sct_isa().decode() != wanted:
        raise NativeCodeError(
            f"SECATEUR_ISA is {wanted!r}, which this processor or this build does not have: "
            f"unset it, or choose from {', '.join(_names(library))}"
        )
    return library


def available() -> bool:
    """Return whether the native code is installed and usable here."""
    try:
        load_library()
    except NativeCodeError:
        return False
    return True


def isa() -> str:
    """Return the instruction set in use: one of `instruction_sets()`."""
    return str(load_library().sct_isa().decode())


def instruction_sets() -> list[str]:
    """Return those that this processor has, the best first."""
    return _names(load_library())


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process."""
    if load_library().sct_set_isa(name.encode()) != 0:
        raise NativeCodeError(
            f"the instruction set {name!r} is unknown or not to be had here: "
            f"choose from {', '.join(instruction_sets())}"
        )


def _names(library: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while (name := library.sct_isa_at(len(names))) is not None:
        names.append(name.decode())
    return names


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """A weight [out_features, in_features] as the kernels read it, checked when it is made.

    Attributes
    ----------
    kind
        How a kept value is stored: bf16, fp16, int8 (code - 128), int4 (code - 8, low nibble first) or nl4.
    shape
        (out_features, in_features).
    values
        The kept values in row order; 16-bit patterns for floats, bytes for integers. What lies behind the last one is
        padding that may be read.
    bitmask
        uint8 [out_features, ceil(in_features / 64) * 8], True = kept; None when the weight is dense.
    row_offsets
        int64 [out_features + 1], in elements of values; None when the weight is dense.
    scales
        bf16 as uint16 [out_features, ceil(in_features / group_size)]; None for floats.
    group_size
        32, 64 or 128 input positions; 0 for floats.
    name
        What an error calls it.

    Raises
    ------
    CheckpointError
        When the parts contradict each other.
    """

    kind: str
    shape: tuple[int, int]
    values: Array
    bitmask: Array | None = None
    row_offsets: Array | None = None
    scales: Array | None = None
    group_size: int = 0
    name: str = "weight"
    struct: WeightStruct = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_arrays()
        rows, cols = self.shape
        struct = WeightStruct(
            KINDS[self.kind],
            self.group_size,
            rows,
            cols,
            _address(self.bitmask),
            _address(self.values),
            _address(self.row_offsets),
            _address(self.scales),
            self.values.nbytes,
        )
        object.__setattr__(self, "struct", struct)
        problem = load_library().sct_check_weight(ctypes.byref(struct))
        if problem is not None:
            raise self._damaged(problem.decode())

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.values, self.bitmask, self.row_offsets, self.scales)
        return sum(part.nbytes for part in parts if part is not None)

    def _check_arrays(self) -> None:
        """Check types and sizes, which the native code takes on trust."""
        rows, cols = self.shape
        if self.kind not in KINDS:
            raise self._damaged(f"the kind of its values is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if rows < 1 or cols < 1:
            raise self._damaged(f"its shape is {self.shape}")
        integer = self.kind in {"int8", "int4", "nl4"}
        if integer and self.group_size not in GROUP_SIZES:
            raise self._damaged(f"its group size is {self.group_size}, expected 32, 64 or 128")
        expected: dict[str, tuple[Array | None, type, tuple[int, ...]]] = {
            "values": (self.values, np.uint8 if integer else np.uint16, self.values.shape[:1]),
            "bitmask": (self.bitmask, np.uint8, (rows, -(-cols // WORD_BITS) * 8)),
            "row_offsets": (self.row_offsets, np.int64, (rows + 1,)),
            "scales": (self.scales, np.uint16, (rows, -(-cols // self.group_size) if integer else 0)),
        }
        for part, (array, dtype, shape) in expected.items():
            if array is None:
                continue
            if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
                raise self._damaged(
                    f"its {part} are {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} {list(shape)}"
                )

    def _damaged(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"packed weight {self.name!r} is damaged: {problem}; derive or fetch the sub-model again"
        )


class Pool:
    """Threads for `matmul`, the calling one among them; started at the first use, and anew after a fork."""

    def __init__(self, threads: int) -> None:
        self._library = load_library()
        self.threads = max(1, threads)
        self.handle = self._library.sct_pool_create(self.threads)
        if not self.handle:
            raise MemoryError

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.sct_pool_destroy(self.handle)
            self.handle = None


def matmul(weight: NativeWeight, x: NDArray[np.float32], pool: Pool | None = None) -> NDArray[np.float32]:
    """Return x @ weight.T.

    Parameters
    ----------
    x
        float32 [n, in_features]. Integer weights take it as signed bytes with a scale for each 64 columns.
    pool
        Threads to share the work; None works in the calling thread.

    Returns
    -------
    float32 [n, out_features].
    """
    rows, cols = weight.shape
    if x.ndim != 2 or x.shape[1] != cols:
        raise ValueError(f"x has shape {x.shape}, expected [n, {cols}]")
    x = np.ascontiguousarray(x, dtype=np.float32)
    y = np.empty((x.shape[0], rows), dtype=np.float32)
    handle = pool.handle if pool is not None else None
    if load_library().sct_matmul(handle, ctypes.byref(weight.struct), x.ctypes.data, x.shape[0], y.ctypes.data) != 0:
        raise MemoryError
    return y


def unpack_row(weight: NativeWeight, row: int) -> NDArray[np.float32]:
    """Return one row as float32 [in_features], zeros where nothing was kept."""
    rows, cols = weight.shape
    if not 0 <= row < rows:
        raise IndexError(f"row {row} of a weight with {rows} rows")
    out = np.empty(cols, dtype=np.float32)
    load_library().sct_unpack_row(ctypes.byref(weight.struct), row, out.ctypes.data)
    return out


def _address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data
