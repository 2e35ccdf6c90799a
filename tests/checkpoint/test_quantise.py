import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.checkpoint import quantise as module
from secateur.checkpoint.quantise import OFFSETS, Quantised, dequantise, n_groups, quantise
from secateur.errors import ModelError

RANGES = {8: (-127, 127), 4: (-8, 7)}


def case(rows, width, seed=0, kept=0.5, dtype=torch.float32):
    """Return (weight with a few outliers, mask, importance over several decades)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * 0.05
    weight *= 1 + 4 * (torch.rand(rows, width, generator=generator) < 0.02)
    mask = torch.rand(rows, width, generator=generator) < kept
    return weight.to(dtype), mask, torch.exp(2 * torch.randn(width, generator=generator))


def codes_of(found, bits):
    return found.codes.int() - OFFSETS[bits]


def group_errors(weight, mask, importance, found, bits, group_size):
    """sum of importance * (w - s * q)^2 over the kept entries of each group, float64 [rows, groups]."""
    scales = found.scales.double().repeat_interleave(group_size, 1)[:, : weight.shape[1]]
    error = importance * ((weight.double() - scales * codes_of(found, bits)) * mask).square()
    groups = found.scales.shape[1]
    padded = torch.nn.functional.pad(error, (0, groups * group_size - weight.shape[1]))
    return padded.view(len(weight), groups, group_size).sum(2)


def rounded_with(weight, mask, scale, bits, group_size):
    """The nearest codes for given bfloat16 scales [rows, groups]."""
    wide = scale.float().repeat_interleave(group_size, 1)[:, : weight.shape[1]]
    codes = torch.where(wide == 0, 0.0, weight.float() / wide).round().clamp(*RANGES[bits]) * mask
    return Quantised((codes + OFFSETS[bits]).to(torch.uint8), scale)


def absmax(weight, mask, bits, group_size):
    """Plain rounding: the largest entry of a group becomes the largest code."""
    groups = n_groups(weight.shape[1], group_size)
    padded = torch.nn.functional.pad((weight.float() * mask).abs(), (0, groups * group_size - weight.shape[1]))
    scale = padded.view(len(weight), groups, group_size).amax(2) / RANGES[bits][1]
    return rounded_with(weight, mask, scale.bfloat16(), bits, group_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_scales(bits, group_size, dtype):
    weight, mask, importance = case(7, 200, dtype=dtype)
    found = quantise(weight, mask, importance, bits=bits, group_size=group_size)
    assert (found.codes.dtype, found.codes.shape) == (torch.uint8, (7, 200))
    assert (found.scales.dtype, found.scales.shape) == (torch.bfloat16, (7, n_groups(200, group_size)))
    assert torch.isfinite(found.scales).all()
    codes = codes_of(found, bits)
    assert RANGES[bits][0] <= int(codes.min()) < 0 < int(codes.max()) <= RANGES[bits][1]
    assert not codes[~mask].any()
    # No neighbouring code is better: the scale was rounded to bfloat16 first.
    error = group_errors(weight, mask, importance, found, bits, group_size)
    for step in (-1, 1):
        moved = ((codes + step).clamp(*RANGES[bits]) * mask + OFFSETS[bits]).to(torch.uint8)
        scales = found.scales.double().repeat_interleave(group_size, 1)[:, :200]
        there = (weight.double() - scales * (moved.int() - OFFSETS[bits])).abs()
        here = (weight.double() - scales * codes).abs()
        assert bool((here <= there + 1e-7).all())
    assert float(error.sum()) > 0


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers(1, 6), st.integers(1, 300),
    st.floats(0, 1), st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
def test_never_worse_than_plain_rounding(bits, group_size, rows, width, kept, seed, weighted):
    weight, mask, importance = case(rows, width, seed, kept)
    importance = importance if weighted else torch.ones(width)
    found = quantise(weight, mask, importance if weighted else None, bits=bits, group_size=group_size)
    plain = absmax(weight, mask, bits, group_size)
    mine = group_errors(weight, mask, importance, found, bits, group_size)
    theirs = group_errors(weight, mask, importance, plain, bits, group_size)
    assert bool((mine <= theirs * (1 + 1e-5) + 1e-12).all())


def best_of_all_scales(weight, importance, bits):
    """The least error of one group [n] over every bfloat16 scale, of both signs, that could matter."""
    span = float(weight.abs().max()) / RANGES[bits][1]
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
    every = every[(every > span / 3) & (every < span * 1.5)]
    every = torch.cat([every, -every])[:, None]
    codes = (weight.double() / every).round().clamp(*RANGES[bits])
    return float((importance * (weight.double() - every * codes).square()).sum(1).min())


@pytest.mark.parametrize(("bits", "kept", "allowed"), [(4, 4, 1.6), (4, 12, 1.15), (8, 12, 1.35), (8, 24, 1.5)])
def test_it_is_close_to_the_best_of_all_scales(bits, kept, allowed):
    """Brute force over every scale: single groups may miss it, the sum over 100 groups is near."""
    generator = torch.Generator().manual_seed(bits + kept)
    mine = best = plain = 0.0
    for seed in range(100):
        weight, _, importance = case(1, 32, seed)
        mask = torch.zeros(1, 32, dtype=torch.bool)
        mask[0, torch.randperm(32, generator=generator)[:kept]] = True
        found = quantise(weight, mask, importance, bits=bits, group_size=32)
        error = float(group_errors(weight, mask, importance, found, bits, 32))
        least = best_of_all_scales(weight[mask], importance[mask[0]], bits)
        assert error >= least * (1 - 1e-6)
        mine, best = mine + error, best + least
        plain += float(group_errors(weight, mask, importance, absmax(weight, mask, bits, 32), bits, 32))
    assert mine < allowed * best
    assert mine < 0.8 * plain


def test_the_sign_of_the_scale_uses_the_ninth_code():
    weight = torch.zeros(2, 32)
    weight[:, :8] = torch.tensor([8.0, -7, 6, -5, 4, -3, 2, -1])
    weight[1] *= -1
    found = quantise(weight, None, None, bits=4, group_size=32)
    assert found.scales.flatten().tolist() == [-1.0, 1.0]
    assert torch.equal(dequantise(found, bits=4, group_size=32), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_on_a_grid_is_met_exactly(bits):
    low, high = RANGES[bits]
    codes = torch.randint(low, high + 1, (20, 256), generator=torch.Generator().manual_seed(0))
    codes[:, ::64] = high
    weight = codes * 2.0**-9 * torch.tensor([1.0, 0.75, 1.5, 1.25]).repeat_interleave(64)
    found = quantise(weight, None, None, bits=bits, group_size=64)
    assert torch.equal(dequantise(found, bits=bits, group_size=64), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_loud_inputs_are_served_first(bits):
    weight, mask, importance = case(64, 256, seed=3)
    found = quantise(weight, mask, importance, bits=bits, group_size=64)
    alike = quantise(weight, mask, None, bits=bits, group_size=64)
    error, alike_error = (group_errors(weight, mask, importance, one, bits, 64).sum() for one in (found, alike))
    assert float(error) < 0.9 * float(alike_error)
    plain = [group_errors(weight, mask, torch.ones(256), one, bits, 64).sum() for one in (found, alike)]
    assert float(plain[1]) < float(plain[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [20, 64, 200, 896])
def test_the_same_for_any_chunk_and_number_of_threads(bits, width, monkeypatch):
    weight, mask, importance = case(61, width, dtype=torch.bfloat16)
    wanted = quantise(weight, mask, importance, bits=bits, group_size=64)
    threads = torch.get_num_threads()
    try:
        for chunk, count in ((1, 1), (256, 2), (1000, 3), (4096, 4), (1 << 20, 4)):
            monkeypatch.setattr(module, "_CHUNK", chunk)
            torch.set_num_threads(count)
            found = quantise(weight, mask, importance, bits=bits, group_size=64)
            assert torch.equal(found.codes, wanted.codes)
            assert torch.equal(found.scales.view(torch.int16), wanted.scales.view(torch.int16))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-3, 1e20, 3e38])
def test_any_magnitude(bits, size):
    weight, mask, importance = case(4, 100)
    weight = weight / weight.abs().max() * size
    found = quantise(weight, mask, importance * 1e30, bits=bits, group_size=32)
    assert torch.isfinite(found.scales).all()
    assert bool((codes_of(found, bits)[~mask] == 0).all())
    if size > 1e-35:
        error = group_errors(weight / size, mask, importance, scaled(found, size), bits, 32).sum()
        assert float(error) < (0.02 if bits == 4 else 1e-4) * float((importance * (weight / size * mask) ** 2).sum())


def scaled(found, size):
    return Quantised(found.codes, found.scales.double() / size)


def test_one_huge_entry_does_not_spoil_the_rest():
    weight, mask, importance = case(2, 64)
    weight[0, 0], mask[0, 0] = 1e30, True
    found = quantise(weight, mask, importance, bits=8, group_size=32)
    alone = quantise(weight[1:], mask[1:], importance, bits=8, group_size=32)
    back = dequantise(found, bits=8, group_size=32)
    assert float(back[0, 0]) == pytest.approx(1e30, rel=0.01)
    assert torch.isfinite(back).all()
    assert torch.isfinite(dequantise(alone, bits=8, group_size=32)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_keep_nothing_or_only_zeros(bits):
    weight, mask, importance = case(3, 96)
    mask[0] = False
    weight[1, 32:64] = 0
    found = quantise(weight, mask, importance, bits=bits, group_size=32)
    assert not found.scales[0].any()
    assert float(found.scales[1, 1]) == 0
    assert float(found.scales[2, 1]) != 0
    assert torch.isfinite(dequantise(found, bits=bits, group_size=32)).all()
    assert not dequantise(found, bits=bits, group_size=32)[0].any()
    silent = quantise(weight, mask, torch.zeros(96), bits=bits, group_size=32)  # inputs that were never seen
    assert torch.equal(silent.codes, quantise(weight, mask, None, bits=bits, group_size=32).codes)
    half = torch.cat([torch.zeros(32), torch.ones(64)])
    assert torch.isfinite(quantise(weight, mask, half, bits=bits, group_size=32).scales).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    weight, mask, importance = case(3, 96)
    weight[1, 5] = bad
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        quantise(weight, mask, importance, bits=4, group_size=32)


def test_nothing_to_quantise():
    found = quantise(torch.zeros(0, 70), None, None, bits=4, group_size=64)
    assert (found.codes.shape, found.scales.shape) == ((0, 70), (0, 2))


@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_exact_in_float32_and_rounded_once_otherwise(bits):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 1 << bits, (50, 200), generator=generator, dtype=torch.uint8)
    scales = (torch.randn(50, 4, generator=generator) * 0.01).bfloat16()
    wide = scales.double().repeat_interleave(64, 1)[:, :200]
    exact = (codes.double() - OFFSETS[bits]) * wide
    found = dequantise(Quantised(codes, scales), bits=bits, group_size=64)
    assert torch.equal(found.double(), exact)
    assert not torch.signbit(found[found == 0]).any()
    for dtype in (torch.bfloat16, torch.float16):
        rounded = dequantise(Quantised(codes, scales), bits=bits, group_size=64, dtype=dtype)
        assert torch.equal(rounded, found.to(dtype))


def test_it_is_done_in_parts(monkeypatch):
    weight, mask, importance = case(40, 130)
    found = quantise(weight, mask, importance, bits=4, group_size=32)
    whole = dequantise(found, bits=4, group_size=32)
    monkeypatch.setattr(module, "_CHUNK", 8)
    assert torch.equal(dequantise(found, bits=4, group_size=32), whole)
    assert np.isfinite(whole.numpy()).all()
