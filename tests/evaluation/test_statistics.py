import numpy as np
import pytest

from secateur.evaluation.statistics import ratio, ratio_difference, student_quantile


def clusters(seed=0, count=60):
    """Nats and tokens of documents of unequal length, hard and easy."""
    random = np.random.default_rng(seed)
    tokens = random.integers(100, 1000, count).astype(float)
    return tokens * random.normal(2.0, 0.4, count), tokens, random


def test_standard_error_agrees_with_a_bootstrap_over_documents():
    nats, tokens, random = clusters()
    value, error = ratio(nats, tokens)
    assert value == pytest.approx(nats.sum() / tokens.sum(), rel=1e-12)
    drawn = random.integers(0, len(nats), (20_000, len(nats)))
    bootstrap = (nats[drawn].sum(1) / tokens[drawn].sum(1)).std(ddof=1)
    assert error == pytest.approx(bootstrap, rel=0.04)


def test_equal_documents_give_the_textbook_error_of_a_mean():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    assert ratio(values, np.ones(4)) == pytest.approx((4.0, values.std(ddof=1) / 2))


def test_paired_difference_agrees_with_a_bootstrap_and_cancels_what_is_common():
    nats, tokens, random = clusters()
    other = nats * 0.9 + tokens * random.normal(0, 0.02, len(nats))
    other_tokens = tokens * random.uniform(0.8, 1.2, len(nats))  # another tokenizer
    for below in (tokens, other_tokens):
        difference = ratio_difference(nats, tokens, other, below)
        drawn = random.integers(0, len(nats), (20_000, len(nats)))
        samples = nats[drawn].sum(1) / tokens[drawn].sum(1) - other[drawn].sum(1) / below[drawn].sum(1)
        assert difference.value == pytest.approx(nats.sum() / tokens.sum() - other.sum() / below.sum(), abs=1e-12)
        assert difference.standard_error == pytest.approx(samples.std(ddof=1), rel=0.05)
    paired = ratio_difference(nats, tokens, other, tokens)
    assert paired.standard_error < ratio(nats, tokens)[1] / 3


def test_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(600):
        nats, tokens, random = clusters(seed, count=8)
        other = nats - 0.3 * tokens + tokens * random.normal(0, 0.2, 8)
        difference = ratio_difference(nats, tokens, other, tokens)
        covered += difference.low <= 0.3 <= difference.high
    assert 0.92 <= covered / 600 <= 0.98


def test_one_document_has_no_error():
    assert ratio([3.0], [2.0]) == (1.5, None)
    difference = ratio_difference([3.0], [2.0], [1.0], [2.0])
    assert (difference.value, difference.standard_error, difference.low, difference.high) == (1.0, None, None, None)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one numerator"):
        ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (30, 2.0423), (1000, 1.9623)],
)
def test_student_quantile_against_a_printed_table(degrees, expected):
    assert student_quantile(0.975, degrees) == pytest.approx(expected, rel=2e-3)
