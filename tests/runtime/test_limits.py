"""What bounds decoding: that the right rows are counted, not how fast anything is."""

import numpy as np
import pytest

from secateur.runtime import kernels
from secateur.runtime.kernels import Pool
from secateur.runtime.limits import measure_limits, product_bytes, read_memory
from tests.runtime.native_weights import random_weight

if not kernels.available():
    pytest.skip("the native code is not built", allow_module_level=True)


def test_bytes_are_those_of_the_rows_that_are_multiplied():
    _, weight = random_weight(np.random.default_rng(0), "int8", (64, 128), 64, None)
    assert weight.nbytes == 64 * 128 + 64 * 2 * 2
    assert product_bytes([(weight, 64), (weight, 16)]) == weight.nbytes * 5 // 4


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_limits_of_every_weight_in_proportion_to_its_rows(kind, threads):
    _, weight = random_weight(np.random.default_rng(0), kind, (96, 640), 64, 0.5)
    once, often = (measure_limits([(weight, rows)], Pool(threads), 1e15) for rows in (96, 96 * 50))
    assert 0 < once.unpacking < often.unpacking
    assert once.unpacking == once.both, "memory is no limit"
    assert once.read == weight.nbytes
    slow = measure_limits([(weight, 96)], Pool(threads), 1.0)
    assert slow.both == weight.nbytes, "memory is the limit"


def test_reading_memory_reads_all_of_it():
    for size in (7, 4096, 4099):
        data = np.arange(1, size + 1, dtype=np.uint64)
        assert {read_memory(data), read_memory(data, Pool(2)), read_memory(data, Pool(3))} == {int(data.sum())}
