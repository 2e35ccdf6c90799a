import itertools
import math

import numpy as np
import pytest

from secateur.evaluation.proportions import holm, mean_share, paired, pass_at_k, wilson


@pytest.mark.parametrize(
    ("samples", "correct", "k"), [(5, 0, 2), (5, 2, 1), (5, 2, 3), (6, 3, 3), (4, 4, 4), (7, 1, 5)]
)
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_right_one(samples, correct, k):
    answers = [True] * correct + [False] * (samples - correct)
    choices = list(itertools.combinations(answers, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("samples", "correct", "k"), [(3, 4, 1), (3, 1, 4), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_refuses_what_cannot_be(samples, correct, k):
    with pytest.raises(ValueError, match="cannot be told"):
        pass_at_k(samples, correct, k)


def test_wilson_solves_its_own_equation():
    """The ends are the shares p at which the observed one is 1.96 standard errors of p away."""
    share = wilson(61, 164)
    for end in (share.low, share.high):
        assert abs(61 / 164 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 164), rel=1e-5)
    assert wilson(0, 10).low == pytest.approx(0, abs=1e-12)
    assert wilson(10, 10).high == pytest.approx(1)
    assert 0 < wilson(0, 10).high < 0.3


def test_an_interval_of_shares_that_are_not_whole_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = sum((share := mean_share(rng.beta(2, 3, 60))).low <= 0.4 <= share.high for _ in range(100))
    assert 88 <= covered <= 100


def test_a_difference_is_that_of_the_same_problems():
    ours, theirs = np.array([1, 1, 0, 0, 1] * 20), np.array([1, 0, 0, 0, 1] * 20)
    found = paired(ours, theirs)
    assert found.difference.value == pytest.approx(0.2)
    assert found.difference.low > 0.1
    assert found.kept is not None
    assert found.kept.value == pytest.approx(1.5)
    # 20 gained and none lost: 2 / 2^20.
    assert found.p_value == pytest.approx(2 / 2**20)


def test_equal_models_do_not_differ():
    found = paired([1, 0, 1, 0], [1, 0, 1, 0])
    assert (found.difference.value, found.p_value) == (0.0, 1.0)
    assert found.kept is not None
    assert found.kept.value == 1.0


@pytest.mark.parametrize(("solved", "count"), [(30, 60), (5, 60), (0, 60), (60, 60)])
def test_that_nothing_differs_among_some_problems_does_not_mean_that_nothing_does(solved, count):
    values = [1] * solved + [0] * (count - solved)
    found = paired(values, values)
    assert -0.15 < found.difference.low < -0.005 < 0.005 < found.difference.high < 0.15
    if solved:
        assert found.kept is not None
        assert found.kept.low < 0.99 < 1.01 < found.kept.high
    lost = paired([0] * count, [1] * solved + [0] * (count - solved)) if solved else None
    assert lost is None or (lost.kept.low == 0 and lost.kept.high > 0.02)  # type: ignore[union-attr]


def test_newcombes_interval_of_a_difference():
    """Both solve 36, ours alone 12, the other alone 2, neither 0: table II of Newcombe (1998), method 10."""
    ours, theirs = [1] * 48 + [0] * 2, [1] * 36 + [0] * 12 + [1] * 2
    found = paired(ours, theirs).difference
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


def test_intervals_of_pairs_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    chances = np.array([0.42, 0.05, 0.13, 0.40])  # both, ours alone, theirs alone, neither
    of_difference = of_kept = 0
    for _ in range(600):
        kind = rng.choice(4, 100, p=chances)
        found = paired(kind <= 1, (kind == 0) | (kind == 2))
        of_difference += found.difference.low <= -0.08 <= found.difference.high
        assert found.kept is not None
        of_kept += found.kept.low <= 0.47 / 0.55 <= found.kept.high
    assert 0.925 <= of_difference / 600 <= 0.985
    assert 0.925 <= of_kept / 600 <= 0.985


@pytest.mark.parametrize("count", [80, 164])
def test_shares_that_are_kept_are_exact(count):
    for ours, theirs, kept in ((12, 16, 0.75), (24, 32, 0.75), (57, 76, 0.75), (72, 80, 0.9)):
        values = [[1] * some + [0] * (count - some) for some in (ours, theirs)]
        assert paired(*values).kept.value == kept  # type: ignore[union-attr]


def test_nothing_is_kept_of_nothing():
    assert paired([1, 0], [0, 0]).kept is None


def test_mcnemar_counts_what_only_one_solves():
    # 3 gained, 7 lost: twice the chance of at most 3 heads in 10 tosses.
    ours = [1] * 3 + [0] * 7 + [1] * 30
    theirs = [0] * 3 + [1] * 7 + [1] * 30
    expected = 2 * sum(math.comb(10, heads) for heads in range(4)) / 2**10
    assert paired(ours, theirs).p_value == pytest.approx(expected)


def test_signs_are_flipped_where_shares_are_not_whole():
    ours = np.full(12, 0.9)
    theirs = np.full(12, 0.5)
    assert paired(ours, theirs).p_value == pytest.approx(2 / 2**12, abs=1e-3)
    assert paired(ours, ours[::-1]).p_value == 1.0


def test_models_on_other_problems_are_not_compared():
    with pytest.raises(ValueError, match="same problems"):
        paired([1, 0], [1, 0, 1])


def test_holm_is_a_step_down_of_bonferroni():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
