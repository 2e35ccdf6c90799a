"""Codes that make up for each other's rounding."""

import pytest
import torch

from secateur.checkpoint.bitmask import pack_integers, unpack
from secateur.checkpoint.format import Encoding
from secateur.checkpoint.quantise import CODEBOOKS, dequantise, quantise
from secateur.pruning.layer_problem import LayerProblem
from secateur.pruning.masks import Target, keep_top
from secateur.pruning.rounding import _better_rows, _in_order, settle
from tests.pruning.test_gram_methods import damped, error, layer, statistics
from tests.pruning.tiny_derivation import calibration, derive_tiny, masks_and_weights
from tests.tiny import save_tiny


def rounded(weight, inputs, values, group_size=32, sparsity=0.5, sweeps=4):
    """Return (nearest codes, settled codes, mask) of a weight pruned by Wanda."""
    found = statistics(inputs)
    mask = keep_top(weight.abs() * found.input_norms, Target(sparsity))
    options = {"values": values, "group_size": group_size}
    nearest = quantise(weight, mask, found.sum_squares, **options)
    return nearest, settle(LayerProblem.of(weight, found), weight, nearest, mask, **options, sweeps=sweeps), mask


def loss(quantised, weight, inputs, values, group_size=32):
    return error(dequantise(quantised, values=values, group_size=group_size), weight, damped(inputs))


@pytest.mark.parametrize("values", ["int4", "int8", "nl4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_each_sweep_leaves_less_error(values, sparsity):
    weight, inputs = layer(width=150, tokens=5000)
    losses = []
    for sweeps in range(5):
        nearest, settled, mask = rounded(weight, inputs, values, sparsity=sparsity, sweeps=sweeps)
        assert torch.equal(nearest.scales, settled.scales)
        assert (settled.codes[~mask] == CODEBOOKS[values].removed).all()
        numbers = CODEBOOKS[values].numbers(settled.codes)
        assert CODEBOOKS[values].lowest <= numbers.min() and numbers.max() <= CODEBOOKS[values].highest
        losses.append(loss(settled, weight, inputs, values))
    assert losses[0] <= loss(nearest, weight, inputs, values)  # with no sweep it is the first step alone
    assert losses == sorted(losses, reverse=True)
    # What pruning has cost can be made up for in part; where nothing was pruned, all is rounding.
    assert losses[-1] < (0.65 if sparsity == 0 else 0.85) * loss(nearest, weight, inputs, values)


@pytest.mark.parametrize("values", ["int4", "int8", "nl4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_of_inputs_that_were_always_0_the_nearest_codes_stay(values, sparsity):
    weight, inputs = layer(width=150, tokens=5000)
    inputs[:, [3, 17, 149]] = 0
    found = statistics(inputs)
    mask = keep_top(weight.abs() * found.input_norms, Target(sparsity))
    mask[::2, [3, 17]] = True  # as in a row that has more of them than it removes
    options = {"values": values, "group_size": 32}
    nearest = quantise(weight, mask, found.sum_squares, **options)
    settled = settle(LayerProblem.of(weight, found), weight, nearest, mask, **options)
    assert torch.equal(settled.codes[:, [3, 17, 149]], nearest.codes[:, [3, 17, 149]])
    assert (settled.codes[:, [3, 17]] != CODEBOOKS[values].removed).any()
    assert not torch.equal(settled.codes, nearest.codes)


def test_a_place_to_begin_that_is_better_than_the_nearest_codes(monkeypatch):
    """Inputs of few directions, as those of language models are."""
    weight, inputs = layer(rows=64, width=150, tokens=5000)
    few = torch.randn(5000, 30, generator=torch.Generator().manual_seed(2)) @ layer(30, 150)[0]
    inputs = few + 0.3 * inputs
    ours = loss(rounded(weight, inputs, "int4", sparsity=0.0)[1], weight, inputs, "int4")
    monkeypatch.setattr("secateur.pruning.rounding._better_rows", lambda problem, steps, nearest, other: nearest)
    assert ours < 0.95 * loss(rounded(weight, inputs, "int4", sparsity=0.0)[1], weight, inputs, "int4")


def test_columns_are_rounded_in_order_as_gptq_does():
    """Written plainly: the inverse of what is left of the matrix is computed anew for every column."""
    weight, inputs = layer(rows=5, width=140)
    problem = LayerProblem.of(weight, statistics(inputs))
    steps = 0.7 + torch.rand(140, 5, generator=torch.Generator().manual_seed(1))
    steps[[3, 70, 139]] = 0  # removed
    codes = _in_order(problem, problem.dense.T.contiguous(), steps, CODEBOOKS["int4"])
    left, gram = problem.dense.T.double().clone(), problem.gram.double()
    for j in range(140):
        inverse = torch.linalg.inv(gram[j:, j:])
        expected = (left[j] / steps[j]).round().clamp(-8, 7) if steps[j].any() else torch.zeros(5)
        assert torch.equal(codes[j].double(), expected.double())
        error_ = (left[j] - codes[j] * steps[j]) / inverse[0, 0]
        left[j:] -= inverse[0][:, None] * error_


def test_a_row_begins_with_the_better_codes():
    weight, inputs = layer(rows=3, width=20)
    problem = LayerProblem.of(weight, statistics(inputs))
    steps = torch.ones(20, 3)
    good, bad = problem.dense.T.round(), torch.zeros(20, 3)
    first, second = (
        torch.stack([good[:, 0], bad[:, 1], good[:, 2]], 1),
        torch.stack([bad[:, 0], good[:, 1], bad[:, 2]], 1),
    )
    assert torch.equal(_better_rows(problem, steps, first, second), good)
    assert torch.equal(_better_rows(problem, steps, second, first), good)


def test_in_the_end_no_other_code_of_a_weight_would_be_better():
    weight, inputs = layer(rows=3, width=40)
    _, settled, mask = rounded(weight, inputs, "int4", sweeps=100)
    best = loss(settled, weight, inputs, "int4")
    for row, column in mask.nonzero().tolist():
        before = int(settled.codes[row, column])
        for code in range(16):
            settled.codes[row, column] = code
            assert loss(settled, weight, inputs, "int4") >= best - 1e-7
        settled.codes[row, column] = before


def test_beside_the_best_of_all_codes():
    """All codes of rows of five weights are tried out."""
    weight, inputs = layer(rows=12, width=5, seed=3)
    gram = damped(inputs)
    nearest, settled, _ = rounded(weight, inputs, "int4", sparsity=0)
    scales = nearest.scales.double()

    def row_loss(values, row):
        difference = values - weight[row].double()
        return float(difference @ gram @ difference)

    ours = best = simple = 0.0
    every = torch.cartesian_prod(*[torch.arange(-8.0, 8.0)] * 5).double()
    for row in range(12):
        differences = every * scales[row] - weight[row].double()
        best += float((differences @ gram * differences).sum(1).min())
        ours += row_loss((settled.codes[row].double() - 8) * scales[row], row)
        simple += row_loss((nearest.codes[row].double() - 8) * scales[row], row)
    assert best <= ours * (1 + 1e-6)
    assert ours - best < 0.5 * (simple - best)


def test_groups_without_a_scale_stay_empty():
    weight, inputs = layer(width=64)
    weight[:, :32] = 0
    nearest, settled, _ = rounded(weight, inputs, "int4", sparsity=0)
    assert not nearest.scales[:, 0].any()
    assert (settled.codes[:, :32] == 8).all()


@pytest.mark.parametrize("values", ["int4", "int8", "nl4"])
def test_a_derivation_with_a_gram_matrix_rounds_so(tmp_path, monkeypatch, values):
    base = save_tiny(tmp_path / "base")
    derive_tiny(base, tmp_path / "settled", method="admm", values=values, calibration=calibration(samples=20))
    monkeypatch.setattr("secateur.pruning.weight.settle", lambda problem, weight, quantised, mask, **options: quantised)
    derive_tiny(base, tmp_path / "nearest", method="admm", values=values, calibration=calibration(samples=20))
    settled, nearest = (masks_and_weights(tmp_path / name) for name in ("settled", "nearest"))
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(settled[first][0], nearest[first][0])
    assert not torch.equal(settled[first][1], nearest[first][1])


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_levels_without_a_zero_store_groups_without_a_scale(sparsity):
    """What is kept there is 0 whatever its code, and must not have that of what is removed."""
    weight, inputs = layer(rows=4, width=77)
    weight[1] = 0
    weight[:, 32:64] = 0
    _, settled, mask = rounded(weight, inputs, "nl4", sparsity=sparsity)
    assert (settled.codes[mask] < 16).all()
    assert (settled.codes[~mask] == 16).all()
    encoding = Encoding("nl4", 32)
    found, found_mask = unpack(pack_integers(settled, mask, 4), (4, 77), encoding=encoding)
    assert torch.equal(found_mask, mask)
    assert torch.equal(found, dequantise(settled, values="nl4", group_size=32))
    assert not found[1].any()
    assert not found[:, 32:64].any()


def test_steps_that_are_nearly_nothing_do_no_harm():
    weight, inputs = layer(rows=4, width=64)
    weight[:, :32] *= 1e-36
    for values in ("int4", "nl4"):
        _, settled, _ = rounded(weight, inputs * 1e-3, values)
        assert torch.isfinite(dequantise(settled, values=values, group_size=32)).all()
