import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.checkpoint import quantise as module
from secateur.checkpoint.quantise import CODEBOOKS, Quantised, dequantise, n_groups, quantise
from secateur.errors import ModelError

VALUES = ["int4", "int8", "nl4"]
RANGES = {"int8": (-127, 127), "int4": (-8, 7), "nl4": (-127, 113)}


def case(rows, width, seed=0, kept=0.5, dtype=torch.float32):
    """Return (weight with a few outliers, mask, importance over several decades)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * 0.05
    weight *= 1 + 4 * (torch.rand(rows, width, generator=generator) < 0.02)
    mask = torch.rand(rows, width, generator=generator) < kept
    return weight.to(dtype), mask, torch.exp(2 * torch.randn(width, generator=generator))


def codes_of(found, values):
    return CODEBOOKS[values].numbers(found.codes)


def group_errors(weight, mask, importance, found, values, group_size):
    """sum of importance * (w - s * q)^2 over the kept entries of each group, float64 [rows, groups]."""
    scales = found.scales.double().repeat_interleave(group_size, 1)[:, : weight.shape[1]]
    error = importance * ((weight.double() - scales * codes_of(found, values)) * mask).square()
    groups = found.scales.shape[1]
    padded = torch.nn.functional.pad(error, (0, groups * group_size - weight.shape[1]))
    return padded.view(len(weight), groups, group_size).sum(2)


def rounded_with(weight, mask, scale, values, group_size):
    """The nearest codes for given bfloat16 scales [rows, groups]."""
    wide = scale.float().repeat_interleave(group_size, 1)[:, : weight.shape[1]]
    book = CODEBOOKS[values]
    numbers = book.nearest(torch.where(wide == 0, 0.0, weight.float() / wide)) * mask
    return Quantised(book.codes(numbers, mask), scale)


def absmax(weight, mask, values, group_size):
    """Plain rounding: the largest entry of a group becomes the largest code."""
    groups = n_groups(weight.shape[1], group_size)
    padded = torch.nn.functional.pad((weight.float() * mask).abs(), (0, groups * group_size - weight.shape[1]))
    scale = padded.view(len(weight), groups, group_size).amax(2) / RANGES[values][1]
    return rounded_with(weight, mask, scale.bfloat16(), values, group_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("values", VALUES)
def test_codes_and_scales(values, group_size, dtype):
    weight, mask, importance = case(7, 200, dtype=dtype)
    found = quantise(weight, mask, importance, values=values, group_size=group_size)
    assert (found.codes.dtype, found.codes.shape) == (torch.uint8, (7, 200))
    assert (found.scales.dtype, found.scales.shape) == (torch.bfloat16, (7, n_groups(200, group_size)))
    assert torch.isfinite(found.scales).all()
    codes = codes_of(found, values)
    assert RANGES[values][0] <= int(codes.min()) < 0 < int(codes.max()) <= RANGES[values][1]
    assert not codes[~mask].any()
    # No neighbouring code is better: the scale was rounded to bfloat16 first.
    error = group_errors(weight, mask, importance, found, values, group_size)
    every = torch.arange(*RANGES["int8"]) if values != "nl4" else torch.tensor(CODEBOOKS["nl4"].levels)
    scales = found.scales.double().repeat_interleave(group_size, 1)[:, :200]
    here = (weight.double() - scales * codes).abs()[mask]
    for number in every[(every >= RANGES[values][0]) & (every <= RANGES[values][1])].tolist():
        assert bool((here <= (weight.double() - scales * number).abs()[mask] + 1e-7).all())
    assert float(error.sum()) > 0


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(VALUES), st.sampled_from([32, 64, 128]), st.integers(1, 6), st.integers(1, 300),
    st.floats(0, 1), st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
def test_never_worse_than_plain_rounding(values, group_size, rows, width, kept, seed, weighted):
    weight, mask, importance = case(rows, width, seed, kept)
    importance = importance if weighted else torch.ones(width)
    found = quantise(weight, mask, importance if weighted else None, values=values, group_size=group_size)
    plain = absmax(weight, mask, values, group_size)
    mine = group_errors(weight, mask, importance, found, values, group_size)
    theirs = group_errors(weight, mask, importance, plain, values, group_size)
    assert bool((mine <= theirs * (1 + 1e-5) + 1e-12).all())


def best_of_all_scales(weight, importance, values):
    """The least error of one group [n] over every bfloat16 scale, of both signs, that could matter."""
    span = float(weight.abs().max()) / RANGES[values][1]
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
    every = every[(every > span / 3) & (every < span * 1.5)]
    every = torch.cat([every, -every])[:, None]
    codes = CODEBOOKS[values].nearest((weight.double() / every).float()).double()
    return float((importance * (weight.double() - every * codes).square()).sum(1).min())


@pytest.mark.parametrize(
    ("values", "kept", "allowed"),
    [("int4", 4, 1.6), ("int4", 12, 1.15), ("int8", 12, 1.35), ("int8", 24, 1.5), ("nl4", 4, 2), ("nl4", 12, 1.25)],
)
def test_it_is_close_to_the_best_of_all_scales(values, kept, allowed):
    """Brute force over every scale: single groups may miss it, the sum over 100 groups is near."""
    generator = torch.Generator().manual_seed(kept + (8 if values == "int8" else 4))
    mine = best = plain = 0.0
    for seed in range(100):
        weight, _, importance = case(1, 32, seed)
        mask = torch.zeros(1, 32, dtype=torch.bool)
        mask[0, torch.randperm(32, generator=generator)[:kept]] = True
        found = quantise(weight, mask, importance, values=values, group_size=32)
        error = float(group_errors(weight, mask, importance, found, values, 32))
        least = best_of_all_scales(weight[mask], importance[mask[0]], values)
        assert error >= least * (1 - 1e-6)
        mine, best = mine + error, best + least
        plain += float(group_errors(weight, mask, importance, absmax(weight, mask, values, 32), values, 32))
    assert mine < allowed * best
    assert mine < 0.8 * plain


def test_the_sign_of_the_scale_uses_the_ninth_code():
    weight = torch.zeros(2, 32)
    weight[:, :8] = torch.tensor([8.0, -7, 6, -5, 4, -3, 2, -1])
    weight[1] *= -1
    found = quantise(weight, None, None, values="int4", group_size=32)
    assert found.scales.flatten().tolist() == [-1.0, 1.0]
    assert torch.equal(dequantise(found, values="int4", group_size=32), weight)


@pytest.mark.parametrize("values", VALUES)
def test_what_is_on_a_grid_is_met_exactly(values):
    low, high = RANGES[values]
    codes = torch.randint(low, high + 1, (20, 256), generator=torch.Generator().manual_seed(0))
    codes = CODEBOOKS[values].nearest(codes.float())
    codes[:, ::64] = high
    weight = codes * 2.0**-9 * torch.tensor([1.0, 0.75, 1.5, 1.25]).repeat_interleave(64)
    found = quantise(weight, None, None, values=values, group_size=64)
    assert torch.equal(dequantise(found, values=values, group_size=64), weight)


@pytest.mark.parametrize("values", VALUES)
def test_loud_inputs_are_served_first(values):
    weight, mask, importance = case(64, 256, seed=3)
    found = quantise(weight, mask, importance, values=values, group_size=64)
    alike = quantise(weight, mask, None, values=values, group_size=64)
    error, alike_error = (group_errors(weight, mask, importance, one, values, 64).sum() for one in (found, alike))
    assert float(error) < 0.9 * float(alike_error)
    plain = [group_errors(weight, mask, torch.ones(256), one, values, 64).sum() for one in (found, alike)]
    assert float(plain[1]) < float(plain[0])


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("width", [20, 64, 200, 896])
def test_the_same_for_any_chunk_and_number_of_threads(values, width, monkeypatch):
    weight, mask, importance = case(61, width, dtype=torch.bfloat16)
    wanted = quantise(weight, mask, importance, values=values, group_size=64)
    threads = torch.get_num_threads()
    try:
        for chunk, count in ((1, 1), (256, 2), (1000, 3), (4096, 4), (1 << 20, 4)):
            monkeypatch.setattr(module, "_CHUNK", chunk)
            torch.set_num_threads(count)
            found = quantise(weight, mask, importance, values=values, group_size=64)
            assert torch.equal(found.codes, wanted.codes)
            assert torch.equal(found.scales.view(torch.int16), wanted.scales.view(torch.int16))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-3, 1e20, 3e38])
def test_any_magnitude(values, size):
    weight, mask, importance = case(4, 100)
    weight = weight / weight.abs().max() * size
    found = quantise(weight, mask, importance * 1e30, values=values, group_size=32)
    assert torch.isfinite(found.scales).all()
    assert bool((codes_of(found, values)[~mask] == 0).all())
    if size > 1e-35:
        error = group_errors(weight / size, mask, importance, scaled(found, size), values, 32).sum()
        assert float(error) < (1e-4 if values == "int8" else 0.02) * float(
            (importance * (weight / size * mask) ** 2).sum()
        )


def scaled(found, size):
    return Quantised(found.codes, found.scales.double() / size)


def test_one_huge_entry_does_not_spoil_the_rest():
    weight, mask, importance = case(2, 64)
    weight[0, 0], mask[0, 0] = 1e30, True
    found = quantise(weight, mask, importance, values="int8", group_size=32)
    alone = quantise(weight[1:], mask[1:], importance, values="int8", group_size=32)
    back = dequantise(found, values="int8", group_size=32)
    assert float(back[0, 0]) == pytest.approx(1e30, rel=0.01)
    assert torch.isfinite(back).all()
    assert torch.isfinite(dequantise(alone, values="int8", group_size=32)).all()


@pytest.mark.parametrize("values", VALUES)
def test_groups_that_keep_nothing_or_only_zeros(values):
    weight, mask, importance = case(3, 96)
    mask[0] = False
    weight[1, 32:64] = 0
    found = quantise(weight, mask, importance, values=values, group_size=32)
    assert not found.scales[0].any()
    assert float(found.scales[1, 1]) == 0
    assert float(found.scales[2, 1]) != 0
    assert torch.isfinite(dequantise(found, values=values, group_size=32)).all()
    assert not dequantise(found, values=values, group_size=32)[0].any()
    silent = quantise(weight, mask, torch.zeros(96), values=values, group_size=32)  # inputs that were never seen
    assert torch.equal(silent.codes, quantise(weight, mask, None, values=values, group_size=32).codes)
    half = torch.cat([torch.zeros(32), torch.ones(64)])
    assert torch.isfinite(quantise(weight, mask, half, values=values, group_size=32).scales).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    weight, mask, importance = case(3, 96)
    weight[1, 5] = bad
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        quantise(weight, mask, importance, values="int4", group_size=32)


def test_nothing_to_quantise():
    found = quantise(torch.zeros(0, 70), None, None, values="int4", group_size=64)
    assert (found.codes.shape, found.scales.shape) == ((0, 70), (0, 2))


@pytest.mark.parametrize("values", VALUES)
def test_products_are_exact_in_float32_and_rounded_once_otherwise(values):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 256 if values == "int8" else 16, (50, 200), generator=generator, dtype=torch.uint8)
    scales = (torch.randn(50, 4, generator=generator) * 0.01).bfloat16()
    wide = scales.double().repeat_interleave(64, 1)[:, :200]
    exact = CODEBOOKS[values].numbers(codes).double() * wide
    found = dequantise(Quantised(codes, scales), values=values, group_size=64)
    assert torch.equal(found.double(), exact)
    assert not torch.signbit(found[found == 0]).any()
    for dtype in (torch.bfloat16, torch.float16):
        rounded = dequantise(Quantised(codes, scales), values=values, group_size=64, dtype=dtype)
        assert torch.equal(rounded, found.to(dtype))


def test_it_is_done_in_parts(monkeypatch):
    weight, mask, importance = case(40, 130)
    found = quantise(weight, mask, importance, values="int4", group_size=32)
    whole = dequantise(found, values="int4", group_size=32)
    monkeypatch.setattr(module, "_CHUNK", 8)
    assert torch.equal(dequantise(found, values="int4", group_size=32), whole)
    assert np.isfinite(whole.numpy()).all()


def test_levels_that_are_not_even_serve_a_bell_curve_better():
    weight = torch.randn(100, 256, generator=torch.Generator().manual_seed(0))
    lost = {}
    for values in ("int4", "nl4"):
        found = quantise(weight, None, None, values=values, group_size=64)
        lost[values] = float((dequantise(found, values=values, group_size=64) - weight).square().mean())
    assert lost["nl4"] < 0.85 * lost["int4"]


@pytest.mark.parametrize("values", VALUES)
def test_codes_stand_for_numbers_and_one_more_for_what_is_gone(values):
    book = CODEBOOKS[values]
    codes = torch.arange(1 if values == "int8" else 0, 256 if values == "int8" else 16).to(torch.uint8)
    numbers = book.numbers(codes)
    assert torch.equal(book.codes(numbers), codes)
    assert (float(numbers.min()), float(numbers.max())) == RANGES[values]
    assert bool((numbers[1:] > numbers[:-1]).all())
    gone = torch.tensor([book.removed], dtype=torch.uint8)
    assert float(book.numbers(gone)) == 0
    assert torch.equal(book.codes(torch.zeros(2), torch.tensor([False, True]))[:1], gone)
    assert int(book.codes(torch.zeros(2), torch.tensor([False, True]))[1]) < len(codes) + 1
