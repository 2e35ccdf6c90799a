"""What bounds decoding: the bandwidth of memory, and how fast kernels unpack weights that a cache already holds.

Measured with the threads that a model runs on, so that a speed can be told as a fraction of them.
"""

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.kernels import NativeWeight, Pool, load_library

BANDWIDTH_BYTES = 400_000_000  # more than any cache
CACHED_BYTES = 400_000  # of each thread: in the second-level cache of processors since 2015 but the smallest
SECONDS = 0.02  # that a kernel is timed for

Products = Sequence[tuple[NativeWeight, int]]


def read_memory(data: NDArray[Any], pool: Pool | None = None) -> int:
    """Read an array with plain loads and return the sum of its 64-bit words."""
    handle = pool.handle if pool is not None else None
    return int(load_library().sct_read_memory(handle, data.ctypes.data, data.nbytes))


def bandwidth(pool: Pool, attempts: int = 3) -> float:
    """Return how many bytes memory gives in a second, read with plain loads; the best of some attempts."""
    memory = np.ones(BANDWIDTH_BYTES, dtype=np.uint8)
    seconds = []
    for _ in range(attempts):
        start = time.perf_counter()
        read_memory(memory, pool)
        seconds.append(time.perf_counter() - start)
    return memory.nbytes / min(seconds)


def product_bytes(products: Products) -> int:
    """Return the bytes of all rows that are multiplied: what a decoded token reads."""
    return round(sum(weight.nbytes * rows / weight.shape[0] for weight, rows in products))


@dataclass(frozen=True)
class Limits:
    """What bounds the products of one decoded token.

    Attributes
    ----------
    read
        Bytes of all rows that are multiplied.
    unpacking
        Seconds that they take if no byte comes from memory.
    both
        Seconds if each weight takes as long as what binds it: memory, or unpacking.
    """

    read: int
    unpacking: float
    both: float


def measure_limits(products: Products, pool: Pool, bytes_per_second: float) -> Limits:
    """Measure what bounds a token's products.

    Among weights of one kind and shape the rows of one that fit into the caches are multiplied again and again, and
    stand for all others.

    Parameters
    ----------
    products
        Weights, and how many rows of each are multiplied.
    bytes_per_second
        What memory gives.
    """
    alike: dict[tuple[object, ...], list[tuple[NativeWeight, int]]] = {}
    for weight, rows in products:
        key = (weight.kind, weight.shape, weight.group_size, weight.bitmask is None)
        alike.setdefault(key, []).append((weight, rows))
    unpacking = both = 0.0
    for group in alike.values():
        seconds = _row_seconds(group[0][0], pool) * sum(rows for _, rows in group)
        unpacking += seconds
        both += max(seconds, product_bytes(group) / bytes_per_second)
    return Limits(product_bytes(products), unpacking, both)


def _row_seconds(weight: NativeWeight, pool: Pool) -> float:
    rows = min(weight.shape[0], max(1, CACHED_BYTES * pool.threads * weight.shape[0] // weight.nbytes))

    def run(times: int) -> float:
        start = time.perf_counter()
        if load_library().sct_repeat_product(pool.handle, ctypes.byref(weight.struct), rows, times) != 0:
            raise MemoryError
        return time.perf_counter() - start

    run(2)  # brings the rows to the caches
    times = max(2, round(SECONDS / max(run(2) / 2, 1e-7)))
    return min(run(times) for _ in range(3)) / times / rows
