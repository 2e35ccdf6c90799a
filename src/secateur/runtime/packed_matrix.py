"""A matrix of a sub-model as it lies in the file, on any torch device, and what is computed from it.

On the CPU the native kernels multiply with it. Elsewhere, and where there is no native code, torch operations unpack
it, a block of rows at a time, and nothing of that stays. It knows neither files nor the modules that use it.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.checkpoint.bitmask import VALUE_TYPES, PackedWeight, check
from secateur.checkpoint.dense import DenseWeight, stored_width, unpack_dense
from secateur.checkpoint.format import Encoding
from secateur.checkpoint.integers import damaged
from secateur.checkpoint.quantise import CODEBOOKS, Codebook, spread_scales
from secateur.runtime import kernels

# Entries that are unpacked at a time, in some 200 MB: a head may have hundreds of millions.
BLOCK_ENTRIES = 1 << 24
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Steps of so few tokens are products and little else.
FEW_TOKENS = 16
NATIVE_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


class PackedMatrix(nn.Module):
    """A matrix [out_features, in_features], pruned or dense, stored as docs/checkpoint-format.md says.

    Parameters
    ----------
    parts
        Tensors by suffix: `values`; `bitmask` and `row_offsets` of a pruned matrix; `scales` of integers. They are used
        where they lie, so those of a mapped file take no memory of their own.
    shape
        (out_features, in_features).
    encoding
        How values are stored.
    dtype
        The precision of the model. It follows the module's `.to`; the stored numbers do not.
    name
        What an error calls it.
    rows
        int64 [out_features]: where each row is stored; None where that is its own place.

    Raises
    ------
    CheckpointError
        When the parts contradict each other.
    """

    rows: Tensor | None
    values: Tensor
    bitmask: Tensor | None  # None when the matrix is dense, as are the offsets
    row_offsets: Tensor
    scales: Tensor  # None when the values are floats

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        shape: tuple[int, int],
        encoding: Encoding,
        dtype: torch.dtype,
        name: str,
        *,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.encoding, self.name = shape, encoding, name
        self._check_types(parts)
        self.value_type = parts["values"].dtype
        for suffix in ("bitmask", "values", "row_offsets", "scales"):
            self.register_buffer(suffix, _as_integers(parts[suffix]) if suffix in parts else None)
        self.register_buffer("rows", rows)
        # Holds no numbers: it has the precision and the device that the module was moved to. It is a parameter because
        # a model whose matrices are all packed may have no other, and transformers asks the first one.
        self.precision = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self._is_native = self._kind() is not None and self.values.numel() > 0 and kernels.available()
        self._native: kernels.NativeWeight | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Check what the buffers hold; raises `CheckpointError`."""
        if self._is_native and self.values.device.type == "cpu":
            self._native = self._make_native()
        else:
            values, scales = self.values.view(self.value_type).cpu(), self.scales
            scales = scales if scales is None else scales.view(torch.bfloat16).cpu()
            if self.bitmask is None:
                unpack_dense(DenseWeight(values, scales), self.shape, self.name, self.encoding)
            else:
                packed = PackedWeight(self.bitmask.cpu(), values, self.row_offsets.cpu(), scales)
                check(packed, self.shape, self.name, self.encoding)
        self._blocks = self._make_blocks()

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ self.T + bias: x float [n, in_features], bias [out_features], result [n, out_features] as x."""
        if self._is_native and x.device.type == self.values.device.type == "cpu" and x.dtype in NATIVE_INPUTS:
            product = self._multiply_natively(x)
        else:
            products = [nn.functional.linear(x, self._unpack_rows(block, x.dtype)) for block in self._blocks]
            product = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        if self.rows is not None:
            product = product.index_select(1, self.rows)
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    def unpack(self) -> Tensor:
        """Return the whole matrix in the model's precision, zeros where nothing was kept: a copy."""
        stored = torch.cat([self._unpack_rows(block, self.precision.dtype) for block in self._blocks])
        return stored if self.rows is None else stored[self.rows]

    def look_up(self, rows: Tensor) -> Tensor:
        """Return rows [n, in_features] of a dense matrix in the model's precision; `rows` are indices [n]."""
        stored = rows if self.rows is None else self.rows.index_select(0, rows)
        scales = None if self.scales is None else self.scales.index_select(0, stored)
        return self._unpack_dense(self.values.index_select(0, stored), scales).to(self.precision.dtype)

    def _multiply_natively(self, x: Tensor) -> Tensor:
        if self._native is None:
            self._native = self._make_native()
        threads = _lent.threads or torch.get_num_threads()
        product = kernels.matmul(
            self._native, x.detach().float().contiguous().numpy(), _pool(threads) if threads > 1 else None
        )
        return torch.from_numpy(product)

    def _kind(self) -> str | None:
        """Return what the kernels call the values; None for float32, which they do not read."""
        return self.encoding.values if self.encoding.bits else KINDS.get(self.value_type)

    def _make_native(self) -> kernels.NativeWeight:
        def array(part: Tensor | None, dtype: type) -> kernels.Array | None:
            return None if part is None else part.numpy().view(dtype)

        return kernels.NativeWeight(
            str(self._kind()),
            self.shape,
            self.values.numpy().reshape(-1).view(np.uint8 if self.encoding.bits else np.uint16),
            bitmask=array(self.bitmask, np.uint8),
            row_offsets=array(self.row_offsets, np.int64),
            scales=array(self.scales, np.uint16),
            group_size=self.encoding.group_size,
            name=self.name,
        )

    def _check_types(self, parts: Mapping[str, Tensor]) -> None:
        """Check what neither the native code nor a view of the bits would notice."""
        types = {
            "bitmask": (torch.uint8,),
            "values": (torch.uint8,) if self.encoding.bits else VALUE_TYPES,
            "row_offsets": (torch.int64,),
            "scales": (torch.bfloat16,),
        }
        for suffix, part in parts.items():
            if part.dtype not in types[suffix]:
                raise damaged(self.name, f"its {suffix} are {part.dtype}, expected {types[suffix][0]}")
        expected = [self.shape[0], stored_width(self.shape[1], self.encoding)]
        if "bitmask" not in parts and list(parts["values"].shape) != expected:
            raise damaged(self.name, f"its values are {list(parts['values'].shape)}, expected {expected}")

    def _make_blocks(self) -> list[tuple[int, int, int, int]]:
        """Return first and last row, and first and last element of values, of what is unpacked at a time."""
        step = max(1, BLOCK_ENTRIES // self.shape[1])
        begins = range(0, self.shape[0], step)
        ends = [min(begin + step, self.shape[0]) for begin in begins]
        if self.bitmask is None:
            return [(begin, end, begin, end) for begin, end in zip(begins, ends, strict=True)]
        # Read here, where they are in main memory: an accelerator would have to wait for them at every product.
        at = self.row_offsets
        return [(begin, end, int(at[begin]), int(at[end])) for begin, end in zip(begins, ends, strict=True)]

    def _unpack_rows(self, block: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        begin, end, first, last = block
        values = self.values[first:last]
        if self.bitmask is None:
            return self._unpack_dense(values, None if self.scales is None else self.scales[begin:end]).to(dtype)
        bits = torch.arange(8, dtype=torch.uint8, device=values.device)
        mask = (self.bitmask[begin:end, :, None] >> bits & 1).view(torch.bool).flatten(1)[:, : self.shape[1]]
        if not self.encoding.bits:
            stored = torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(mask, values)
            return stored.view(self.value_type).to(dtype)
        if self.encoding.bits == 4:
            # A row with an odd number of codes has an unused half of a byte, which goes to a column of its own.
            odd = mask.sum(1, keepdim=True) % 2 == 1
            mask = torch.cat((mask, odd), dim=1)
            values = _nibbles(values)
        codes = torch.full(mask.shape, self._book.removed, dtype=torch.uint8, device=values.device)
        codes.masked_scatter_(mask, values)
        return self._dequantise(codes[:, : self.shape[1]], self.scales[begin:end]).to(dtype)

    def _unpack_dense(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """Return stored rows of a dense matrix as floats [n, in_features]."""
        if scales is None:
            return values.view(self.value_type)
        codes = values if self.encoding.bits == 8 else _nibbles(values).view(len(values), -1)
        return self._dequantise(codes[:, : self.shape[1]], scales)

    def _dequantise(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return float32 [n, in_features] of rows of codes and the bits of their scales; products are exact."""
        weight = self._book.numbers(codes)
        wide = spread_scales(scales.view(torch.bfloat16), self.encoding.group_size, self.shape[1])
        return weight.mul_(wide).add_(0.0)  # which turns -0 into +0

    @property
    def _book(self) -> Codebook:
        return CODEBOOKS[self.encoding.values]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedMatrix":
        self._native = None  # it points to where the buffers lie now
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}  # copies of a module have their own buffers


def _nibbles(values: Tensor) -> Tensor:
    """Return the codes of bytes [n, ...], low nibble first, one after the other."""
    return torch.stack((values & 15, values >> 4), dim=-1).flatten()


def _as_integers(part: Tensor) -> Tensor:
    """Return the same memory as integers, whose precision `.to` does not change; aligned, which files need not be."""
    whole = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
    part = part.view(whole.get(part.dtype, part.dtype))
    return part.clone() if part.data_ptr() % part.element_size() else part


class _Lent(threading.local):
    """How many threads torch has lent to the products of this thread's step; 0 when it keeps them.

    `known` says whether this thread's own number is its own: torch gives a new one what was set last in any thread.
    """

    threads = 0
    known = False


_lent = _Lent()
_default_threads: list[int] = []


def remember_threads() -> None:
    """Note how many threads torch has here, before it lends any: as many as other threads of the program shall have."""
    _default_threads[:] = [torch.get_num_threads()]
    _lent.known = True


def lend_threads(tokens: int) -> None:
    """Leave torch one thread for a step of a few tokens, and its others to the products of packed matrices.

    Between two operations torch's threads spin for a while, on the processors that the kernels' threads need by then.
    """
    if not _lent.known and _default_threads:
        torch.set_num_threads(_default_threads[0])
    _lent.known = True
    if tokens <= FEW_TOKENS and not _lent.threads:
        _lent.threads = torch.get_num_threads()
        torch.set_num_threads(1)


def return_threads() -> None:
    """Undo `lend_threads`, also where it did nothing."""
    if _lent.threads:
        torch.set_num_threads(_lent.threads)
        _lent.threads = 0


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> kernels.Pool:
    """Return the threads that all matrices of this process share."""
    return kernels.Pool(threads)
