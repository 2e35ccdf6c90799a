"""Calls of the engine's Python side that cannot be meant: an error of ours, and no memory but one's own is read."""

import os

import numpy as np
import pytest

from secateur.errors import ConfigError, ModelError
from secateur.runtime.kernels import Pool
from secateur.runtime.native_model import NativeSequence
from secateur.runtime.options import GenerationOptions
from secateur.runtime.sampling import Sampler
from tests.runtime.native_models import native, tokens


@pytest.fixture(scope="module")
def model(folders):
    return native(folders["llama"]).model


@pytest.mark.parametrize("token", [-1, 384, 2**31, 2**32, -(2**63), 10**30, np.int64(2**32)])
def test_tokens_that_are_none(model, token):
    sequence = NativeSequence(model, 10)
    with pytest.raises(ConfigError, match="outside of the vocabulary of 384"):
        model.forward([1, token], [sequence] * 2, [False, True])
    assert len(sequence) == 0


def test_a_step_of_nothing(model):
    assert model.forward([], [], []).shape == (0, 384)


def test_sequences_of_another_model(folders, model):
    other = native(folders["wide heads"]).model
    own, foreign = NativeSequence(model, 5), NativeSequence(other, 5)
    with pytest.raises(ValueError, match="this is another"):
        model.forward([1, 1], [own, foreign], [True, True])
    assert (len(own), len(foreign)) == (0, 0)


def test_a_full_sequence_among_others(model):
    sequences = [NativeSequence(model, 3), NativeSequence(model, 1)]
    model.forward([1, 1], sequences, [False, False])
    with pytest.raises(ConfigError, match="no room"):
        model.forward([1, 1], sequences, [True, True])
    assert [len(one) for one in sequences] == [1, 1]


@pytest.mark.parametrize("capacity", [0, -1, 2**32 + 1, 2**64 + 5, -(2**64) + 5])
def test_sequences_of_impossible_size(model, capacity):
    with pytest.raises(ConfigError, match="must be 1 to"):
        NativeSequence(model, capacity)


@pytest.mark.parametrize("length", [-1, 4, 2**64, 2**64 + 1])
def test_impossible_cuts(model, length):
    sequence = NativeSequence(model, 5)
    model.forward([1] * 3, [sequence] * 3, [False] * 3)
    with pytest.raises(ValueError, match="cannot be cut"):
        sequence.truncate(length)
    assert len(sequence) == 3


def test_arrays_that_are_not_in_one_piece(model):
    ids = np.array(tokens(12), dtype=np.int32)
    wants = np.array([False, True] * 12, dtype=np.uint8)
    for view in (slice(None, None, 2), slice(None, None, -1)):
        part = ids[view]
        sequences = [NativeSequence(model, 12) for _ in range(2)]
        expected = model.forward(part.tolist(), [sequences[0]] * len(part), [True] * len(part))
        found = model.forward(part, [sequences[1]] * len(part), wants[1 : 2 * len(part) : 2])
        assert np.array_equal(found, expected)


def test_wants_count_by_truth(model):
    sequence = NativeSequence(model, 5)
    assert model.forward([1, 2, 3], [sequence] * 3, [256, 0, -1]).shape == (2, 384)


def test_a_prompt_of_no_tokens(folders):
    backend = native(folders["llama"])
    with pytest.raises(ConfigError, match="prompt of no tokens"):
        list(backend.generate([], GenerationOptions()))
    assert len(list(backend.generate([1], GenerationOptions(max_new_tokens=2, ignore_eos=True)))) == 2


@pytest.mark.parametrize(
    "logits",
    [
        np.zeros(0, np.float32),
        np.zeros(10, np.float64),
        np.zeros((2, 5), np.float32),
        np.zeros(10, np.float32)[::2],
        np.zeros(10, np.float32)[::-1],
    ],
    ids=["empty", "double", "matrix", "with gaps", "backwards"],
)
def test_logits_that_cannot_be_read_in_place(logits):
    with pytest.raises(ValueError, match=r"expected float32 \[vocabulary\]"):
        Sampler(GenerationOptions()).choose(logits)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}], ids=str)
def test_logits_without_a_choice(options):
    sampler = Sampler(GenerationOptions(seed=1, **options))
    for bad in ([-np.inf] * 4, [np.nan] * 4, [np.inf] * 4, [0, np.nan], [np.inf, -np.inf]):
        with pytest.raises(ModelError, match="computes NaN"):
            sampler.choose(np.array(bad, dtype=np.float32))
    assert sampler.choose(np.array([-np.inf, 0, -np.inf], dtype=np.float32)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-4},
        {"temperature": 1e30},
        {"top_k": 2**64 + 1},
        {"top_k": 2**63},
        {"top_p": 1e-6},
        {"min_p": 1 - 1e-16},
        {"repetition_penalty": 1e3},
        {"temperature": 1e-4, "repetition_penalty": 1e-3},
    ],
    ids=str,
)
def test_extreme_options(options):
    sampler = Sampler(GenerationOptions(**{"temperature": 1.0, "seed": 3, **options}))
    logits = np.random.default_rng(0).normal(0, 2, 200).astype(np.float32)
    drawn = {sampler.choose(logits.copy(), [1, 2, 2, 2**31 - 1]) for _ in range(40)}
    assert min(drawn) >= 0
    assert max(drawn) < 200
    assert len(drawn) > 20 or "top_k" not in options  # no limit became a small one


def test_pools_of_forked_processes_of_forked_processes(folders):
    backend = native(folders["qwen2"])
    options = GenerationOptions(max_new_tokens=3, ignore_eos=True)
    expected = list(backend.generate([1, 2, 3], options))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            good = list(backend.generate([1, 2, 3], options)) == expected
            grandchild = os.fork()
            good = good and list(backend.generate([1, 2, 3, 4], options)) != []
            del backend
            if grandchild:
                good = good and os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0
            code = 0 if good else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert Pool(0).threads == 1
