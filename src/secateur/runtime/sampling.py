"""The choice of the next token, in native code: csrc/sampling.h."""

import ctypes
import functools
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.errors import ModelError
from secateur.runtime.kernels import load_library
from secateur.runtime.options import GenerationOptions


class _Sampling(ctypes.Structure):
    """`sct_sampling`."""

    _fields_ = (
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("repetition_penalty", ctypes.c_float),
    )


@functools.cache
def _sample() -> Any:
    function = load_library().sct_sample
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.restype, function.argtypes = ctypes.c_int32, [pointer, count, pointer, pointer, count, pointer]
    return function


class Sampler:
    """Chooses the tokens of one text; equal seeds give equal draws."""

    def __init__(self, options: GenerationOptions) -> None:
        self._penalised = options.repetition_penalty != 1
        top_k = min(options.top_k, 2**31)  # more than any vocabulary: ctypes would cut what has no room
        self._options = _Sampling(options.temperature, top_k, options.top_p, options.min_p, options.repetition_penalty)
        self._state = ctypes.c_uint64(secrets.randbits(64) if options.seed is None else options.seed)

    def choose(self, logits: NDArray[np.float32], known: Sequence[int] = ()) -> int:
        """Return the next token after the `known` ones, from `logits` [vocabulary], which may be changed.

        Raises
        ------
        ModelError
            When a logit is NaN or infinity, or all are minus infinity.
        ValueError
            When `logits` is no array that the native code reads in place.
        """
        if logits.dtype != np.float32 or logits.ndim != 1 or not logits.size or not logits.flags.c_contiguous:
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}, expected float32 [vocabulary], contiguous"
            )
        previous = np.ascontiguousarray(known if self._penalised else (), dtype=np.int32)
        token_id: int = _sample()(
            logits.ctypes.data, len(logits), ctypes.byref(self._options), previous.ctypes.data, len(previous),
            ctypes.byref(self._state),
        )  # fmt: skip
        if token_id == -1:
            raise ModelError("the model computes NaN: its weights are damaged; fetch or derive it again")
        if token_id < 0:
            raise MemoryError
        return token_id
