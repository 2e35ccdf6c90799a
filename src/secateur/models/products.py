"""Products of 16-bit matrices, on processors with and without units for them.

Where a processor has no instructions for bfloat16 (or float16), torch multiplies such matrices several times more
slowly than float32 ones. There the products of many rows are taken in float32 instead, piece by piece, and rounded
once at the end, which is what a processor with such units does. Parameters, activations and results keep their type,
and nothing of the size of a model is ever converted. Products of a few rows are left alone: memory binds them.

Not covered: products that are no `linear`, such as those of attention, and gradient checkpointing, which computes again
outside the block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MIN_ROWS = 16  # below, converting the weight costs more than it gains
_SLAB = 2**22  # elements of a weight that are converted at a time: 16 MB in float32

# As torch names what a processor can do: x86, then ARM.
_UNITS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Return whether the processor multiplies matrices of this type by instructions of its own.

    A torch that cannot tell (before 2.11) is taken to have none: its products are then slower, and not wrong.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype not in _UNITS or any(capabilities.get(name, False) for name in _UNITS[dtype])


@contextmanager
def product_precision(precision: Literal["highest", "medium"], device: torch.device) -> Iterator[None]:
    """Take matrix products of float32 numbers as they are, or rounded to bfloat16 where the device has units for it.

    Sums are float32 in either case.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision if device.type != "cpu" or has_units(torch.bfloat16) else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside the block, `linear` of 16-bit tensors is taken in float32 on a processor without units for their type."""
    with _Widened():
        yield


class _Widened(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear and not kwargs and _is_slow(*args):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _is_slow(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    dtype = weight.dtype
    return (
        dtype in _UNITS
        and weight.dim() == 2
        and weight.device.type == "cpu"
        and inputs.dtype == dtype
        and (bias is None or bias.dtype == dtype)
        and inputs.shape[:-1].numel() >= MIN_ROWS
        and not has_units(dtype)
    )


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (inputs, weight, bias)):
        result: Tensor = _Linear.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _forward(inputs, weight, bias)


class _Linear(torch.autograd.Function):
    """The same with gradients; what is kept for them stays in 16 bits."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _forward(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        flat = slope.flatten(0, -2)
        for_inputs = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            found = torch.zeros(len(flat), weight.shape[1])
            for rows in _slabs(weight):
                found.addmm_(flat[:, rows].float(), weight[rows].float())
            for_inputs = found.to(inputs.dtype).view(inputs.shape)
        if ctx.needs_input_grad[1]:
            seen, for_weight = inputs.flatten(0, -2).float(), torch.empty_like(weight)
            for rows in _slabs(weight):
                for_weight[rows] = flat[:, rows].T.float() @ seen
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0, dtype=torch.float32).to(weight.dtype)
        return for_inputs, for_weight, for_bias


def _forward(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return inputs [..., in_features] times weight [out_features, in_features], plus bias, [..., out_features]."""
    rows = inputs.flatten(0, -2).float()
    result = torch.empty(len(rows), len(weight), dtype=weight.dtype)
    for part in _slabs(weight):
        wide = weight[part].float().T
        result[:, part] = rows @ wide if bias is None else torch.addmm(bias[part].float(), rows, wide)
    return result.view(*inputs.shape[:-1], len(weight))


def _slabs(weight: Tensor) -> Iterator[slice]:
    step = max(1, _SLAB // weight.shape[1])
    for begin in range(0, len(weight), step):
        yield slice(begin, begin + step)
