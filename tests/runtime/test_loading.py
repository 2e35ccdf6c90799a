import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import CheckpointError, ConfigError, ModelError
from secateur.runtime.generation import TransformersBackend
from secateur.runtime.loaded import LoadedModel
from secateur.runtime.loading import load as load_any
from tests.tiny import EOS, save_tiny, tiny_model, tiny_tokenizer


def load(path, **options):
    return load_any(path, engine="torch", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def model():
    return LoadedModel(Path("tiny"), TransformersBackend(tiny_model("llama"), tiny_tokenizer()))


def test_loads_in_the_stored_precision_and_generates_what_transformers_does(folder):
    loaded = load(folder)
    assert loaded.path == folder
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    prompt = loaded.tokenizer("def f(x):", return_tensors="pt")
    expected = loaded.model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    expected = [token for token in expected.tolist() if token != EOS]
    assert loaded.generate("def f(x):", max_new_tokens=20) == loaded.tokenizer.decode(
        expected, skip_special_tokens=True
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_joins_to_generate(model, temperature):
    for seed in range(2):
        options = {"max_new_tokens": 40, "temperature": temperature, "seed": seed, "ignore_eos": True}
        pieces = list(model.stream("x = ", **options))
        assert all(pieces)
        assert "".join(pieces) == model.generate("x = ", **options)


def test_stop_string_is_honoured_and_not_part_of_the_text(model):
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    text = model.generate("x = ", **options)
    stop = text[20:23]
    assert model.generate("x = ", stop=[stop, "not in the text"], **options) == text[: text.index(stop)]
    assert "".join(model.stream("x = ", stop=stop, **options)) == text[: text.index(stop)]


def test_options_are_checked_before_the_first_piece(model):
    with pytest.raises(ConfigError, match="max_new_tokens"):
        model.stream("x", max_new_tokens=0)
    with pytest.raises(ConfigError, match="256 positions"):
        model.stream("x" * 200, max_new_tokens=100)


def test_missing_weights_are_an_error(folder, tmp_path):
    damaged = copy(folder, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing from its files: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(damaged)


def test_weights_of_another_shape_are_an_error(folder, tmp_path):
    damaged = copy(folder, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises((CheckpointError, ModelError), match="damaged"):
        load(damaged)


def test_truncated_weights_are_an_error(folder, tmp_path):
    damaged = copy(folder, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises((CheckpointError, ModelError), match="damaged"):
        load(damaged)


def test_wrong_names_threads_and_devices(folder, tmp_path):
    with pytest.raises(ModelError):
        load(tmp_path / "nothing-here")
    with pytest.raises(ConfigError, match="threads is 0"):
        load(folder, threads=0)
    with pytest.raises(ConfigError, match="'teapot'"):
        load(folder, device="teapot")


def test_threads_are_set_only_when_given(folder):
    before = torch.get_num_threads()
    try:
        load(folder)
        assert torch.get_num_threads() == before
        load(folder, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def copy(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
