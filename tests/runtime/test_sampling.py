"""The native choice of tokens against that in torch."""

import numpy as np
import pytest
import torch

from secateur.errors import ModelError
from secateur.runtime.generation import choose_token
from secateur.runtime.options import GenerationOptions
from secateur.runtime.sampling import Sampler

DRAWS = 6000


def logits_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2.5, size).astype(np.float32)


def native_frequencies(logits, known=(), **options):
    sampler = Sampler(GenerationOptions(temperature=options.pop("temperature", 1.0), seed=0, **options))
    drawn = [sampler.choose(logits.copy(), known) for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=len(logits)) / DRAWS


def torch_frequencies(logits, known=(), **options):
    choice = GenerationOptions(temperature=options.pop("temperature", 1.0), seed=0, **options)
    generator = torch.Generator().manual_seed(0)
    drawn = [choose_token(torch.from_numpy(logits), choice, generator, known) for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_k": 50, "top_p": 0.9, "temperature": 1.5},
        {"min_p": 0.1},
        {"top_p": 0.995},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "top_k": 9},
    ],
    ids=str,
)
def test_distribution_is_that_of_torch(options):
    logits = logits_of(300)
    known = [int(logits.argmax()), int(logits.argmin()), 3, 3]
    found = native_frequencies(logits, known, **options)
    expected = torch_frequencies(logits, known, **options)
    # Two samples of the same distribution: each difference within five of its standard errors.
    error = np.sqrt((found + expected + 2 / DRAWS) / DRAWS)
    assert (np.abs(found - expected) < 5 * error).all()
    assert set(np.flatnonzero(found)) <= allowed(logits, known, options)


def allowed(logits, known, options) -> set[int]:
    """Return every token that may be drawn at all."""
    scores = logits.astype(np.float64)
    penalty = options.get("repetition_penalty", 1.0)
    for token in set(known):
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    order = np.argsort(-scores, kind="stable")[: options.get("top_k") or len(scores)]
    weights = np.exp((scores[order] - scores.max()) / options.get("temperature", 1.0))
    before = np.cumsum(weights) - weights
    kept = (before < options.get("top_p", 1.0) * weights.sum() + 1e-9) & (weights >= options.get("min_p", 0.0))
    return {int(token) for token in order[kept]}


def test_limits_beyond_the_vocabulary():
    logits = logits_of(20)
    assert np.array_equal(native_frequencies(logits, top_k=20), native_frequencies(logits, top_k=500))
    assert np.count_nonzero(native_frequencies(logits, top_p=1e-6)) == 1
    assert np.count_nonzero(native_frequencies(logits, top_k=1)) == 1


def test_long_tails_are_sorted_as_far_as_needed():
    flat = np.zeros(5000, dtype=np.float32)
    found = native_frequencies(flat, top_p=0.5)
    assert np.flatnonzero(found).max() < 2500  # of equals the first ones
    assert np.count_nonzero(found[:2500]) > 2000


def test_greedy_takes_the_first_of_equals():
    logits = np.array([1, 5, 5, -2], dtype=np.float32)
    assert Sampler(GenerationOptions()).choose(logits) == 1
    assert Sampler(GenerationOptions(repetition_penalty=3.0)).choose(logits, [1, 2, 999]) == 1
    assert Sampler(GenerationOptions(repetition_penalty=6.0)).choose(np.array([1, 5], dtype=np.float32), [1]) == 0


def test_damaged_logits_are_an_error():
    for bad in (np.nan, np.inf):
        with pytest.raises(ModelError, match="computes NaN"):
            Sampler(GenerationOptions()).choose(np.array([0, bad, 1], dtype=np.float32))
