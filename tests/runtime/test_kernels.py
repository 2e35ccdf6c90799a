import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from secateur.errors import CheckpointError, NativeCodeError
from secateur.runtime import kernels
from secateur.runtime.kernels import NativeWeight, Pool, matmul, unpack_row
from tests.runtime.native_weights import OFFSETS, parts_of, quantised, random_weight, rounded_to_bf16

if not kernels.available():
    pytest.skip("the native code is not built", allow_module_level=True)

WIDTHS = (1, 63, 65, 576, 896, 1100, 2100, 4864)  # some take several tiles, of which the last is not whole
BATCHES = (1, 2, 5, 8, 16, 17, 70)
ROWS = (1, 15, 16, 17, 33, 64, 65, 130)
KINDS = [("bf16", 0), ("fp16", 0)] + [(kind, group) for kind in ("int8", "int4", "nl4") for group in (32, 64, 128)]


@pytest.fixture(params=kernels.instruction_sets())
def isa(request):
    before = kernels.isa()
    kernels.set_isa(request.param)
    assert kernels.isa() == request.param
    yield request.param
    kernels.set_isa(before)


def expanded_scales(weight):
    scales = (weight.scales.astype(np.uint32) << 16).view(np.float32)
    return np.abs(np.repeat(scales, weight.group_size, axis=1)[:, : weight.shape[1]])


def assert_product(weight, dense, x, y):
    """Float rounding from the product of what is stored and x as that kind meets it; that is x but for its rounding."""
    scales = None
    if weight.kind in OFFSETS:
        seen, scales = quantised(x)
    else:
        seen = (rounded_to_bf16(x) if weight.kind == "bf16" else x).astype(np.float64)
    # Codes have an offset, whose part of a sum may be taken away after it was rounded.
    reach = np.abs(dense) if scales is None else np.abs(dense) + OFFSETS[weight.kind] * expanded_scales(weight)
    size = np.abs(x).astype(np.float64) @ reach.T.astype(np.float64)
    assert np.all(np.abs(y - seen @ dense.T.astype(np.float64)) <= 3e-6 * size + 1e-30)
    bound = np.abs(x) / 256 if scales is None else scales * 0.5000001
    assert np.all(np.abs(y - x.astype(np.float64) @ dense.T) <= bound @ np.abs(dense).T + 3e-6 * size + 1e-30)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize(("kind", "group_size"), KINDS)
def test_product_with_every_shape(isa, kind, group_size, sparse):
    rng = np.random.default_rng([KINDS.index((kind, group_size)), sparse])
    for width in WIDTHS:
        for n in BATCHES:
            rows = int(rng.choice(ROWS[:4] if width * n > 60_000 else ROWS))
            kept = float(rng.choice([0.0, 0.02, 0.4, 0.5, 0.9, 1.0])) if sparse else None
            dense, weight = random_weight(rng, kind, (rows, width), group_size, kept)
            x = rng.standard_normal((n, width)).astype(np.float32)
            assert_product(weight, dense, x, matmul(weight, x))
    row = int(rng.integers(rows))
    np.testing.assert_array_equal(unpack_row(weight, row), dense[row])


@pytest.mark.parametrize(("kind", "lowest", "highest"), [("int8", -128, 127), ("int4", -8, 7), ("nl4", -127, 113)])
def test_extreme_codes_do_not_saturate(isa, kind, lowest, highest):
    rows, cols = 5, 256
    scales = np.full((rows, 4), 0x3F80, np.uint16)
    for code, value in ((0, lowest), (0xFF, highest)):
        values = np.full(rows * cols // (1 if kind == "int8" else 2), code, np.uint8)
        weight = NativeWeight(kind, (rows, cols), values, scales=scales, group_size=64)
        for sign in (1, -1):
            for n in (1, 2, 9, 40):
                x = np.full((n, cols), sign * 127, np.float32)
                assert np.all(matmul(weight, x) == sign * 127 * value * cols)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("kind", ["int8", "int4", "nl4"])
def test_integers_are_multiplied_as_integers(isa, kind, group_size):
    rng = np.random.default_rng(15)
    for kept in (0.02, 0.5, 1.0, None):
        _, parts = parts_of(rng, kind, (9, 448), group_size, kept)
        parts["scales"][...] = 0x3F80  # 1
        weight = NativeWeight(**parts)
        dense = np.stack([unpack_row(weight, row) for row in range(9)])
        for n in (1, 2, 3, 5, 8, 9):
            x = rng.integers(-127, 128, (n, 448)).astype(np.float32)
            x[:, ::64] = 127  # so x is its own code; all sums are below 2 ** 24
            np.testing.assert_array_equal(matmul(weight, x), x @ dense.T)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "nl4"])
def test_what_is_removed_adds_nothing(isa, kind):
    rng = np.random.default_rng(16)
    dense, weight = random_weight(rng, kind, (20, 320), 64 if kind != "bf16" else 0, kept=0.0)
    empty = ~dense.any(axis=1)
    assert empty.sum() >= 18
    # AVX-512 takes the offset of the codes away after rounding, so what it leaves is of the size of that.
    rounds = isa.startswith("avx512") and kind != "bf16"
    left = 3e-6 * OFFSETS[kind] * expanded_scales(weight)[empty] if rounds else np.zeros((empty.sum(), 320))
    for n in (1, 2, 4, 8, 9):
        x = rng.uniform(0.5, 1, (n, 320)).astype(np.float32)
        assert (np.abs(matmul(weight, x)[:, empty]) <= x @ left.T).all()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "nl4"])
def test_inputs_of_any_size(isa, kind):
    rng = np.random.default_rng(7)
    dense, weight = random_weight(rng, kind, (20, 320), 64 if kind != "bf16" else 0)
    x = rng.standard_normal((4, 320)).astype(np.float32) * np.float32(10) ** rng.integers(-20, 15, (4, 1))
    x[1, 64:128] = 0
    x[2] = 0
    assert_product(weight, dense, x, matmul(weight, x))
    assert not matmul(weight, x)[2].any()
    assert np.all(np.abs(matmul(weight, np.full((1, 320), 1e-38, np.float32))) < 1e-30)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "nl4"])
@pytest.mark.parametrize("n", [1, 3, 6, 20])
def test_what_is_not_finite_stays_visible(isa, kind, n):
    rng = np.random.default_rng(8)
    _, weight = random_weight(rng, kind, (20, 200), 64 if kind != "bf16" else 0, kept=1.0)
    for wrong in (np.nan, np.inf, -np.inf):
        x = rng.standard_normal((n, 200)).astype(np.float32)
        x[-1, 199] = wrong
        y = matmul(weight, x)
        assert np.isfinite(y[:-1]).all()
        kept = np.array([unpack_row(weight, row)[199] != 0 for row in range(20)])
        assert not np.isfinite(y[-1][kept]).any()


def test_all_sets_agree():
    rng = np.random.default_rng(9)
    before = kernels.isa()
    for kind, group_size in KINDS:
        _, weight = random_weight(rng, kind, (48, 896), group_size)
        for n in (1, 8, 40):
            x = rng.standard_normal((n, 896)).astype(np.float32)
            results = []
            for name in kernels.instruction_sets():
                kernels.set_isa(name)
                results.append(matmul(weight, x))
            for result in results[:-1]:
                np.testing.assert_allclose(result, results[-1], rtol=1e-4, atol=2e-3)
    kernels.set_isa(before)


def test_pool_gives_the_same_as_one_thread():
    rng = np.random.default_rng(10)
    _, weight = random_weight(rng, "int4", (1000, 576), 64)
    pools = [Pool(threads) for threads in (1, 2, 3, 5)]
    for n in (1, 2, 8, 33):
        x = rng.standard_normal((n, 576)).astype(np.float32)
        expected = matmul(weight, x)
        for pool in pools:
            for _ in range(5):
                assert np.array_equal(matmul(weight, x, pool), expected)


def test_pool_serves_several_callers_at_once():
    rng = np.random.default_rng(11)
    _, weight = random_weight(rng, "int8", (500, 256), 32)
    x = rng.standard_normal((1, 256)).astype(np.float32)
    expected, pool, wrong = matmul(weight, x), Pool(2), []

    def call():
        for _ in range(50):
            if not np.array_equal(matmul(weight, x, pool), expected):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


FORK_SCRIPT = """
import os, sys
import numpy as np
from secateur.runtime.kernels import NativeWeight, Pool, matmul
weight = NativeWeight("int8", (400, 128), np.arange(400 * 128, dtype=np.int64).astype(np.uint8),
                      scales=np.full((400, 2), 0x3F80, np.uint16), group_size=64)
x = np.linspace(-1, 1, 128, dtype=np.float32)[None]
pool = Pool(3)
expected = matmul(weight, x, pool)
child = os.fork()
for _ in range(30):
    assert np.array_equal(matmul(weight, x, pool), expected)
del pool
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_pool_works_after_fork():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK_SCRIPT], check=True, timeout=60)


def corrupted(name, parts):
    """One contradiction; (what is wrong, the sentence that must say so)."""
    rows, cols = parts["shape"]
    parts = {key: part.copy() if isinstance(part, np.ndarray) else part for key, part in parts.items()}
    if name == "bit flipped":
        parts["bitmask"][2, 1] ^= 8
    elif name == "bit beyond":
        parts["bitmask"][0, -1] |= 128
    elif name == "offset":
        parts["row_offsets"][3] += 1
    elif name == "negative offset":
        parts["row_offsets"][1] = -5
    elif name == "first offset":
        parts["row_offsets"] += 1
    elif name == "huge offset":
        parts["row_offsets"][-1] = 2**62
    elif name == "values cut":
        parts["values"] = parts["values"][:-1]
    elif name == "scale":
        parts["scales"][1, 0] = 0x7F80
    elif name == "no offsets":
        parts["row_offsets"] = None
    elif name == "no mask":
        parts["bitmask"] = None
    elif name == "no scales":
        parts["scales"] = None
    elif name == "scales cut":
        parts["scales"] = parts["scales"][:, :-1].copy()
    elif name == "group size":
        parts["group_size"] = 48
    elif name == "wide":
        parts["shape"] = (rows, cols + 64)
    elif name == "tall":
        parts["shape"] = (rows + 1, cols)
    elif name == "empty":
        parts["shape"] = (0, cols)
    elif name == "kind":
        parts["kind"] = "int5"
    return parts


CORRUPTIONS = [
    *("bit flipped", "bit beyond", "offset", "negative offset", "first offset", "huge offset", "values cut", "scale"),
    *("no offsets", "no mask", "no scales", "scales cut", "group size", "wide", "tall", "empty", "kind"),
]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("kind", ["int8", "int4", "nl4"])
def test_corrupted_weights_are_refused(kind, corruption):
    _, parts = parts_of(np.random.default_rng(12), kind, (6, 100), 64, 0.5)
    parts["values"] = parts["values"][: parts["row_offsets"][-1]]
    NativeWeight(**parts)
    with pytest.raises(CheckpointError, match="packed weight 'weight' is damaged: "):
        NativeWeight(**corrupted(corruption, parts))


@pytest.mark.parametrize(("kind", "bits"), [("bf16", 0x7FC0), ("bf16", 0xFF80), ("fp16", 0x7C00), ("fp16", 0xFE00)])
@pytest.mark.parametrize("kept", [0.5, None])
def test_values_that_are_not_finite_are_refused(kind, bits, kept):
    _, parts = parts_of(np.random.default_rng(13), kind, (6, 100), 0, kept)
    parts["values"] = np.append(parts["values"], np.uint16(bits))  # padding is nobody's concern
    NativeWeight(**parts)
    parts["values"][17] = bits
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        NativeWeight(**parts)


def test_dense_weights_need_all_their_values():
    scales = np.full((4, 2), 0x3F80, np.uint16)
    for kind, size in (("int8", 4 * 101), ("int4", 4 * 51), ("nl4", 4 * 51)):
        NativeWeight(kind, (4, 101), np.zeros(size, np.uint8), scales=scales, group_size=64)
        with pytest.raises(CheckpointError, match="too few values"):
            NativeWeight(kind, (4, 101), np.zeros(size - 1, np.uint8), scales=scales, group_size=64)


def test_wrong_calls():
    _, weight = random_weight(np.random.default_rng(14), "bf16", (3, 10), 0)
    with pytest.raises(ValueError, match=r"expected \[n, 10\]"):
        matmul(weight, np.zeros((1, 11), np.float32))
    with pytest.raises(IndexError):
        unpack_row(weight, 3)
    with pytest.raises(NativeCodeError, match=r"choose from .*reference"):
        kernels.set_isa("sse9")
    assert matmul(weight, np.zeros((0, 10), np.float32)).shape == (0, 3)


def run_with(environment, code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_chooses_the_set():
    code = """
    import sys
    from secateur.runtime import kernels
    print(kernels.isa())
    assert "torch" not in sys.modules and "transformers" not in sys.modules
    """
    assert run_with({"SECATEUR_ISA": "reference"}, code).stdout == "reference\n"
    wrong = run_with({"SECATEUR_ISA": "sse9"}, code)
    assert "SECATEUR_ISA is 'sse9'" in wrong.stderr


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "_kernels.so")
    kernels.load_library.cache_clear()
    try:
        assert not kernels.available()
        with pytest.raises(NativeCodeError, match="install a C"):
            kernels.isa()
    finally:
        monkeypatch.undo()
        kernels.load_library.cache_clear()
