"""Swaps against all swaps that there are."""

import pytest
import torch

from secateur.pruning.layer_problem import LayerProblem, refit
from secateur.pruning.masks import Target, keep_top
from secateur.pruning.methods import METHODS
from secateur.pruning.swaps import swap
from tests.pruning.test_gram_methods import layer, statistics


def error(problem, found):
    difference = (found - problem.dense).double()
    return ((difference @ problem.gram.double()) * difference).sum(1)


def begun(rows=24, width=16, seed=0):
    weight, inputs = layer(rows=rows, width=width, seed=seed)
    problem = LayerProblem.of(weight, statistics(inputs))
    mask = keep_top(problem.dense.abs(), Target(0.5))
    return problem, refit(problem, problem.dense, mask, 40), mask


def best_swap(problem, found, mask, row):
    """Every pair of a kept and a removed weight, of which the second gets its best value: the least error, plainly."""
    least = float("inf")
    for i in mask[row].nonzero().flatten().tolist():
        for j in (~mask[row]).nonzero().flatten().tolist():
            tried = found[row].clone()
            tried[i] = 0
            residual = problem.aim[row] - tried @ problem.gram
            tried[j] = residual[j] / problem.gram[j, j]
            least = min(least, float(error(problem, tried)[row]))
    return least


@pytest.mark.parametrize("seed", range(4))
def test_a_round_makes_the_best_swap_of_each_row(seed):
    problem, found, mask = begun(seed=seed)
    before = error(problem, found)
    after, swapped = swap(problem, found, mask, rounds=1)
    assert torch.equal(swapped.sum(1), mask.sum(1))
    assert torch.equal(after != 0, swapped)
    moved = 0
    for row in range(len(mask)):
        least = best_swap(problem, found, mask, row)
        expected = min(least, float(before[row]))
        assert float(error(problem, after)[row]) == pytest.approx(expected, rel=1e-4)
        moved += least < before[row] * (1 - 1e-4)
    assert moved > 0


@pytest.mark.parametrize("seed", range(4))
def test_in_the_end_no_swap_helps(seed):
    problem, found, mask = begun(seed=seed)
    after, swapped = swap(problem, found, mask)
    assert error(problem, after).sum() < 0.95 * error(problem, found).sum()
    for row in range(len(mask)):
        assert best_swap(problem, after, swapped, row) >= float(error(problem, after)[row]) * (1 - 1e-3) - 1e-6


def test_behind_admm_hardly_any_swap_helps():
    weight, inputs = layer(rows=96, width=256, tokens=2000)
    problem = LayerProblem.of(weight, statistics(inputs))
    pruned = METHODS.get("admm").function(weight, statistics(inputs), Target(0.5))
    found = refit(problem, pruned.weight * pruned.mask * problem.norms, pruned.mask, 40)
    after, _ = swap(problem, found, pruned.mask)
    assert error(problem, after).sum() > 0.99 * error(problem, found).sum()


@pytest.mark.parametrize("kept", ["all", "none"])
def test_where_nothing_can_be_swapped(kept):
    problem, found, mask = begun()
    mask = torch.full_like(mask, kept == "all")
    after, swapped = swap(problem, found * mask, mask)
    assert torch.equal(swapped, mask)
    assert torch.equal(after, found * mask)
