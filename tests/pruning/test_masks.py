import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.masks import Target, keep_top, zero_removed

GRANULARITIES = ["per_output", "per_layer"]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def reference(score, sparsity, granularity):
    """A stable ascending sort of each group; the first round(sparsity * size) go."""
    groups = score if granularity == "per_output" else score.reshape(1, -1)
    mask = torch.ones_like(groups, dtype=torch.bool)
    for row in range(groups.shape[0]):
        order = torch.sort(groups[row], stable=True).indices
        mask[row, order[: round(sparsity * groups.shape[1])]] = False
    return mask.reshape(score.shape)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.55, 0.9, 0.999])
@pytest.mark.parametrize("width", [1, 7, 63, 64, 65, 161])
def test_removes_exactly_the_share(width, sparsity, granularity):
    score = torch.rand(9, width, generator=torch.Generator().manual_seed(width))
    mask = keep_top(score, Target(sparsity, granularity))
    assert mask.shape == score.shape
    assert mask.dtype == torch.bool
    removed = (~mask).sum(1)
    if granularity == "per_output":
        assert removed.tolist() == [round(sparsity * width)] * 9
    else:
        assert int(removed.sum()) == round(sparsity * 9 * width)
    assert torch.equal(mask, reference(score, sparsity, granularity))


def test_scores_compete_inside_a_row_or_inside_the_layer():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert keep_top(score, Target(0.5, "per_output")).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert keep_top(score, Target(0.5, "per_layer")).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


def test_of_equal_scores_the_lower_index_is_removed_first():
    assert keep_top(torch.ones(2, 5), Target(0.4)).int().tolist() == [[0, 0, 1, 1, 1]] * 2
    assert keep_top(torch.ones(2, 2), Target(0.5, "per_layer")).int().tolist() == [[0, 0], [1, 1]]
    half = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0, 0.0]])
    assert keep_top(half, Target(0.5)).int().tolist() == [[0, 1, 0, 1, 0, 1]]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 6),
    st.floats(0, 0.999),
    st.sampled_from(GRANULARITIES),
    st.integers(0, 2**32 - 1),
)
def test_equals_a_stable_sort_whatever_the_ties(rows, width, levels, sparsity, granularity, seed):
    """Few distinct scores, as in weights from a quantised file."""
    score = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (rows, width)).astype(np.float32))
    assert torch.equal(keep_top(score, Target(sparsity, granularity)), reference(score, sparsity, granularity))


def test_a_transposed_score_is_no_special_case():
    score = torch.rand(31, 8, generator=torch.Generator().manual_seed(0)).t()
    for granularity in GRANULARITIES:
        assert torch.equal(keep_top(score, Target(0.5, granularity)), reference(score, 0.5, granularity))


@pytest.mark.parametrize("dtype", BITS)
def test_zero_removed_keeps_the_bits_of_every_kept_weight(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    odd = torch.tensor([-0.0, 0.0, tiny / 2, -tiny / 2, torch.finfo(dtype).max, -1.5, float("inf"), 3.0]).to(dtype)
    weight = torch.stack([odd, odd.flip(0), torch.randn(8).to(dtype)])
    weight = torch.cat([weight, weight.roll(1, 1)])
    mask = torch.arange(weight.numel()).reshape(weight.shape) % 3 > 0
    before = weight.clone()
    zeroed = zero_removed(weight, mask)
    assert zeroed.dtype == dtype
    bits, wanted = zeroed.view(BITS[dtype]), weight.view(BITS[dtype])
    assert torch.equal(bits[mask], wanted[mask])
    assert not bits[~mask].any()  # +0, not -0
    assert torch.equal(weight.view(BITS[dtype]), before.view(BITS[dtype]))
    assert torch.equal(zero_removed(weight, torch.ones_like(mask)).view(BITS[dtype]), wanted)
    assert torch.equal(zero_removed(weight.t(), mask.t()).view(BITS[dtype]), bits.t())
