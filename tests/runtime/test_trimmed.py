"""Models whose head computes a shortlist: the same logits as before for its tokens, and no others."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import CheckpointError, ConfigError
from secateur.runtime.limits import product_bytes
from secateur.runtime.loading import load
from secateur.runtime.native_model import NativeSequence
from secateur.runtime.options import GenerationOptions
from tests.calibration.texts import write_folder
from tests.runtime.native_models import close, native, reference_logits, sub_model, tokens
from tests.tiny import VOCABULARY, save_tiny

OUTSIDE = 300  # a row that no token of the tiny tokenizer has
WEIGHTS = {"qwen2": "model.embed_tokens.weight", "llama": "lm_head.weight"}  # tied and untied


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("text"), [f"{i}.py" for i in range(20)])


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory, text):
    root = tmp_path_factory.mktemp("trimmed")
    bases = {family: save_tiny(root / family, family) for family in WEIGHTS}
    return {
        (family, values): sub_model(base, text, root / f"{family}-{values}", values=values, trim_vocabulary=True)
        for family, base in bases.items()
        for values in ("base", "int8", "int4")
    }


def shortlist(folder) -> list[int]:
    return next(tensor for name, tensor in last_shard(folder)[1].items() if name.endswith(".shortlist")).tolist()


def last_shard(folder):
    path = sorted(folder.glob("*.safetensors"))[-1]
    return path, load_file(path)


@pytest.mark.parametrize("values", ["base", "int8", "int4"])
@pytest.mark.parametrize("family", WEIGHTS)
def test_logits_of_the_shortlist_are_those_of_the_whole_head(trimmed, family, values):
    folder = trimmed[family, values]
    model, inside = native(folder).model, shortlist(folder)
    token_ids = [*tokens(20), OUTSIDE, VOCABULARY - 1, 0]
    sequence = NativeSequence(model, 64)
    found = model.forward(token_ids, [sequence] * len(token_ids), [i % 2 == 0 for i in range(len(token_ids))])
    expected = reference_logits(folder, token_ids)[::2]
    assert found.shape == expected.shape
    scale = 1 if values == "base" else 5  # activations in eight bits
    assert np.abs(found[:, inside] - expected[:, inside]).max() < 0.02 * scale * np.abs(expected).max()
    outside = np.setdiff1d(np.arange(VOCABULARY), inside)
    assert OUTSIDE in outside
    assert (found[:, outside] == -np.inf).all()
    with pytest.raises(ConfigError, match="outside of the vocabulary"):
        model.forward([VOCABULARY], [sequence], [True])
    with pytest.raises(ConfigError, match="outside of the vocabulary"):
        model.forward([-1], [sequence], [True])
    assert len(sequence) == len(token_ids)


@pytest.mark.parametrize("family", WEIGHTS)
def test_both_engines_write_tokens_of_the_shortlist_only(trimmed, family):
    folder = trimmed[family, "base"]
    inside, prompt = set(shortlist(folder)), [5, 17, 301, OUTSIDE]
    greedy = GenerationOptions(max_new_tokens=20, ignore_eos=True)
    likeliest = reference_logits(folder, [*tokens(60), *range(OUTSIDE, VOCABULARY)]).argmax(axis=1)
    assert not set(likeliest.tolist()) <= inside, "with the whole head this model writes other tokens too"
    for engine in ("native", "torch"):
        backend = load(folder, engine=engine).backend
        answer = list(backend.generate(prompt, greedy))
        for options in ({}, {"top_k": 300}, {"top_p": 0.9}, {"min_p": 0.01}, {"repetition_penalty": 1.5}):
            drawn = GenerationOptions(max_new_tokens=40, temperature=3.0, seed=1, ignore_eos=True, **options)
            assert set(backend.generate(prompt, drawn)) <= inside
        assert set(answer) <= inside
        # Each token is the best of the shortlist, up to what half precision turns.
        logits = reference_logits(folder, prompt + answer)[len(prompt) - 1 : -1]
        best = logits[:, sorted(inside)].max(axis=1)
        assert (best - logits[np.arange(len(answer)), answer] < 0.04 * np.abs(logits).max()).all()


def test_fewer_bytes_are_read_for_a_token(trimmed, text, tmp_path):
    for family, base in (("qwen2", "qwen2"), ("llama", "llama")):
        folder = trimmed[family, "int8"]
        plain = sub_model(folder.parent / base, text, tmp_path / family, values="int8")
        unread = VOCABULARY - len(shortlist(folder))
        saved = unread * (64 + 2)  # 64 codes and one scale in a row
        assert product_bytes(native(plain).model.products) - product_bytes(native(folder).model.products) == saved


def test_transformers_sees_an_ordinary_model(trimmed):
    model = load(trimmed["qwen2", "int8"], engine="torch").model
    with torch.inference_mode():
        logits = model(torch.tensor([[1, OUTSIDE]])).logits
    assert logits.shape[-1] == VOCABULARY
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda one: one.flip(0), "ascending"),
        (lambda one: one + VOCABULARY, "outside of the vocabulary"),
        (lambda one: one[:-1].clone(), "expected int32"),
        (lambda one: one.long(), "is int64"),
        (lambda one: None, "shortlist"),
    ],
)
def test_a_damaged_shortlist_is_refused(trimmed, tmp_path, engine, change, problem):
    folder = shutil.copytree(trimmed["llama", "int8"], tmp_path / "copy")
    path, parts = last_shard(folder)
    changed = change(parts.pop("lm_head.weight.shortlist"))
    save_file(parts if changed is None else {**parts, "lm_head.weight.shortlist": changed}, path)
    with pytest.raises(CheckpointError, match=problem):
        load(folder, engine=engine)


def test_a_shortlist_of_what_is_not_the_head_is_refused(trimmed, tmp_path):
    folder = shutil.copytree(trimmed["llama", "int8"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["shortlist"]["weight"] = WEIGHTS["qwen2"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"the head is 'lm_head\.weight'"):
        load(folder, engine="native")


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_dense_parent_in_integers_runs(trimmed, text, tmp_path, values):
    base = trimmed["qwen2", "base"].parent / "qwen2"
    folder = sub_model(base, text, tmp_path / "dense", values=values, sparsity=0.0)
    token_ids = tokens(30)
    model = native(folder).model
    found = model.forward(token_ids, [NativeSequence(model, 30)] * 30, [True] * 30)
    expected = reference_logits(folder, token_ids)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert close(found, expected) or values in ("int8", "int4")
