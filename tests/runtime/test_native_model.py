"""The native model's logits against transformers in float32, on tiny models of each family that it runs."""

import numpy as np
import pytest
import torch

from secateur.checkpoint.format import check_quantization_config, read_json
from secateur.errors import ConfigError
from secateur.runtime.loading import load
from secateur.runtime.native_model import NativeSequence
from tests.runtime.native_models import (
    LLAMA3,
    VARIANTS,
    changed_weights,
    close,
    native,
    reference_logits,
    sub_model,
    tokens,
)
from tests.tiny import save_tiny


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(folders, variant):
    model = native(folders[variant]).model
    token_ids = tokens(90)  # beyond the sliding window of mistral, and several blocks of the cache
    expected = reference_logits(folders[variant], token_ids)
    sequence = NativeSequence(model, 100)
    found = model.forward(token_ids[:70], [sequence] * 70, [True] * 70)
    for token_id in token_ids[70:]:
        found = np.concatenate([found, model.forward([token_id], [sequence], [True])])
    assert close(found, expected)
    assert len(sequence) == 90


def test_long_prompts_go_in_parts(folders, tmp_path):
    folder = save_tiny(tmp_path / "long", "llama", max_position_embeddings=700)
    model = native(folder).model
    token_ids = tokens(600)  # more than are computed together
    sequence = NativeSequence(model, 600)
    found = model.forward(token_ids, [sequence] * 600, [i % 7 == 0 for i in range(600)])
    assert close(found, reference_logits(folder, token_ids)[::7])


def test_sequences_of_a_batch_are_independent(folders):
    model = native(folders["qwen2"]).model
    prompts = [tokens(length, seed) for seed, length in enumerate((5, 20, 33))]
    sequences = [NativeSequence(model, 64) for _ in prompts]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        model.forward(prompt, [sequence] * len(prompt), [False] * len(prompt))
    more = [tokens(6, 10 + i) for i in range(3)]
    for step in range(6):
        found = model.forward([one[step] for one in more], sequences, [True, False, True])
    for row, index in enumerate((0, 2)):
        assert close(found[row], reference_logits(folders["qwen2"], prompts[index] + more[index])[-1])


def test_copied_sequence_goes_on_like_its_source(folders):
    model = native(folders["qwen2"]).model
    source, target = NativeSequence(model, 90), NativeSequence(model, 60)
    start, end = tokens(40), tokens(7, 1)
    model.forward(start, [source] * 40, [False] * 40)
    target.copy(source, 37)  # no multiple of the blocks in which keys are kept
    assert len(target) == 37
    found = model.forward(end, [target] * 7, [True] * 7)
    assert close(found, reference_logits(folders["qwen2"], start[:37] + end)[37:])
    assert len(source) == 40
    for length, room in ((41, 60), (40, 39)):
        with pytest.raises(ValueError, match="cannot be copied"):
            NativeSequence(model, room).copy(source, length)


def test_truncated_sequence_goes_on_as_if_nothing_had_followed(folders):
    model = native(folders["mistral"]).model
    sequence = NativeSequence(model, 100)
    start, wrong, right = tokens(40), tokens(30, 1), tokens(30, 2)
    model.forward(start + wrong, [sequence] * 70, [False] * 70)
    sequence.truncate(40)
    found = model.forward(right, [sequence] * 30, [True] * 30)
    assert close(found, reference_logits(folders["mistral"], start + right)[40:])


def test_steps_that_cannot_be_change_nothing(folders):
    model = native(folders["llama"]).model
    sequence = NativeSequence(model, 10)
    model.forward([1, 2, 3], [sequence] * 3, [False] * 3)
    for bad in (-1, 384):
        with pytest.raises(ConfigError, match="outside of the vocabulary of 384"):
            model.forward([1, bad], [sequence] * 2, [False, True])
    with pytest.raises(ConfigError, match="no room for 8 more tokens"):
        model.forward([1] * 8, [sequence] * 8, [False] * 8)
    assert len(sequence) == 3
    with pytest.raises(ValueError, match="cannot be cut"):
        sequence.truncate(4)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_result(folders, threads):
    token_ids = tokens(50)
    found = []
    for count in (2, threads):
        model = native(folders["qwen3"], count).model
        found.append(model.forward(token_ids, [NativeSequence(model, 50)] * 50, [True] * 50))
    assert np.array_equal(*found)


@pytest.fixture(scope="module")
def source_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 12)
    return folder


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ("base", {}),
        ("int8", {}),
        ("int4", {}),
        ("nl4", {}),
        ("int4", {"budget": "packed"}),
        ("nl4", {"budget": "packed"}),
        ("int8", {"budget": "packed"}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sub_model_runs_packed(folders, source_text, tmp_path, family, values, options):
    folder = sub_model(folders[family], source_text, tmp_path / "sub", values=values, **options)
    if options:  # some weights have a bitmask, and others none
        stored = check_quantization_config(read_json(folder / "config.json")["quantization_config"])
        assert 0 < len(stored.unmasked) < len(stored.pruned.shapes)
    model = native(folder).model
    token_ids = tokens(40)
    found = model.forward(token_ids, [NativeSequence(model, 40)] * 40, [True] * 40)
    expected = reference_logits(folder, token_ids)
    # Integer weights take activations as signed bytes, which costs a percent or two of what logits differ by.
    assert close(found, expected) if values == "base" else (found - expected).std() < 0.04 * expected.std()


def test_weights_that_the_config_does_not_ask_for_change_nothing(folders, tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.full((64,), 9.0, dtype=torch.bfloat16)
        tensors["counter"] = torch.ones(3, dtype=torch.bool)  # of a type that the engine does not read

    folder = changed_weights(folders["llama"], tmp_path / "more", add)
    texts = [load(one, engine="native").generate("x", 10, ignore_eos=True) for one in (folders["llama"], folder)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {key: LLAMA3[key] for key in LLAMA3 if not key.startswith("original")}},
    ],
)
def test_rotary_parameters_are_read_as_transformers_reads_them(folders, tmp_path, changes):
    folder = changed_weights(folders["llama"], tmp_path / "rope", lambda _: None, **changes)
    model = native(folder).model
    token_ids = tokens(60)
    found = model.forward(token_ids, [NativeSequence(model, 60)] * 60, [True] * 60)
    assert close(found, reference_logits(folder, token_ids))
