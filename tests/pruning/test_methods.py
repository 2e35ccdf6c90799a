import math

import pytest
import torch

from secateur.calibration.statistics import InputStatistics
from secateur.errors import UnknownNameError
from secateur.pruning.masks import Target
from secateur.pruning.methods import METHODS
from tests.pruning.tiny_derivation import calibration, derive_tiny, masks_and_weights
from tests.tiny import save_tiny


def test_wanda_on_an_example_by_hand():
    """|W| * ||x||: the largest weight goes where its input is weak, the smallest stays where it is strong."""
    weight = torch.tensor([[4.0, 0.0, 1.0, -1.0], [-3.0, -2.0, 1.0, 0.5]])
    sum_squares = torch.tensor([0.25, 1.0, 4.0, 36.0])  # norms 0.5, 1, 2, 6
    # scores [[2, 0, 2, 6], [1.5, 2, 2, 3]]: the first row's tie between the first and the third costs the first
    pruned = METHODS.get("wanda").function(weight, InputStatistics(sum_squares, 7), Target(0.5))
    assert pruned.mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert torch.equal(pruned.weight, weight)
    # In the layer 0, 1.5 and the first two of the five twos go: [0, 0], [0, 2] and [1, 0], [0, 1].
    whole = METHODS.get("wanda").function(weight, InputStatistics(sum_squares, 7), Target(0.5, "per_layer"))
    assert whole.mask.int().tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]


def test_input_norms_are_roots_of_sums_over_tokens():
    assert InputStatistics(torch.tensor([9.0, 2.0]), 5).input_norms.tolist() == pytest.approx([3.0, math.sqrt(2)])


def test_magnitude_ignores_statistics():
    weight = torch.tensor([[4.0, 0.1, -1.0, 2.0]])
    for statistics in (None, InputStatistics(torch.tensor([0.0, 9.0, 9.0, 0.0]), 1)):
        mask = METHODS.get("magnitude").function(weight, statistics, Target(0.5)).mask
        assert mask.int().tolist() == [[1, 0, 0, 1]]


def test_random_is_decided_by_its_seed():
    weight = torch.zeros(16, 64)
    one, again, other = (METHODS.get("random").function(weight, None, Target(0.5, seed=s)).mask for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert 0.3 < float((one & other).float().mean()) / 0.5 < 0.7  # as two unrelated halves overlap


def test_random_differs_between_weights_and_recipe_seeds(tmp_path):
    base = save_tiny(tmp_path / "base")
    masks = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(masks)}"
        derive_tiny(base, out, method="random", calibration=calibration(seed=seed))
        masks.append({name: mask for name, (mask, _) in masks_and_weights(out).items()})
    first, again, other = masks
    for name, mask in first.items():
        assert torch.equal(mask, again[name])
        assert not torch.equal(mask, other[name])
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], first["model.layers.0.mlp.gate_proj.weight"])
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], first["model.layers.1.mlp.up_proj.weight"])


def test_magnitude_looks_at_no_data(tmp_path):
    base = save_tiny(tmp_path / "base")
    derive_tiny(base, tmp_path / "one", method="magnitude", calibration=calibration(seed=0))
    derive_tiny(base, tmp_path / "two", method="magnitude", calibration=calibration(seed=1))
    one, two = masks_and_weights(tmp_path / "one"), masks_and_weights(tmp_path / "two")
    assert all(torch.equal(one[name][0], two[name][0]) for name in one)


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown method 'wandaa': did you mean 'wanda'"):
        METHODS.get("wandaa")
