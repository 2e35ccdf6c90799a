import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import ModelError
from secateur.models.finite import all_finite
from secateur.models.source import ModelFolder
from secateur.models.weights import WeightReader, drop_parameters, load_skeleton, set_parameters
from tests.tiny import FAMILIES, save_tiny, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ModelFolder(save_tiny(tmp_path_factory.mktemp("weights") / "base", "qwen2"), "tiny")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_has_every_parameter_on_meta_and_real_buffers(tmp_path, family):
    model = load_skeleton(ModelFolder(save_tiny(tmp_path, family), "tiny"))
    whole = tiny_model(family)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.training
    for name, buffer in whole.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


def test_reads_what_is_stored(base):
    stored = load_file(base.path / "model.safetensors")
    with WeightReader(base, load_skeleton(base)) as reader:
        assert sorted(reader.names()) == sorted(stored)
        for name, tensor in stored.items():
            assert torch.equal(reader.read(name), tensor)
            assert reader.read(name).dtype == torch.bfloat16
            assert reader.shape(name) == tuple(tensor.shape)
        assert "lm_head.weight" not in reader  # tied


def test_names_without_the_decoder_prefix_are_understood(tmp_path):
    folder = ModelFolder(save_tiny(tmp_path, "llama"), "tiny")
    stored = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    with WeightReader(folder, load_skeleton(folder)) as reader:
        assert sorted(reader.names()) == sorted(stored)
        name = "model.layers.2.mlp.down_proj.weight"
        assert torch.equal(reader.read(name), stored[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path, value):
    folder = ModelFolder(save_tiny(tmp_path, "llama"), "tiny")
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.norm.weight"][3] = value
    save_file(stored, tmp_path / "model.safetensors")
    with WeightReader(folder) as reader, pytest.raises(ModelError, match=r"'model\.norm\.weight' .*holds NaN"):
        reader.checked("model.norm.weight")


def test_a_missing_weight_and_a_strange_type_are_named(tmp_path):
    folder = ModelFolder(save_tiny(tmp_path, "llama"), "tiny")
    save_file({"lm_head.weight": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with WeightReader(folder) as reader:
        with pytest.raises(ModelError, match=r"no weight 'model\.norm\.weight'"):
            reader.read("model.norm.weight")
        with pytest.raises(ModelError, match=r"'lm_head\.weight' .*int8"):
            reader.read("lm_head.weight")


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"gptq.*name its dense parent"),
        ({"quant_method": "secateur"}, r"secateur.*export it with `secateur export --format dense`"),
        (None, "an unnamed method"),
    ],
)
def test_a_compressed_model_is_refused(tmp_path, quantization, named):
    folder = ModelFolder(save_tiny(tmp_path, "llama"), "tiny")
    change_config(tmp_path, quantization_config=quantization)
    with pytest.raises(ModelError, match=f"already compressed .{named}"):
        load_skeleton(folder)


@pytest.mark.parametrize("changes", [{"model_type": "no_such_model"}, {"model_type": "clip"}, {"hidden_size": "x"}])
def test_a_config_that_is_no_decoder_is_refused(tmp_path, changes):
    folder = ModelFolder(save_tiny(tmp_path, "llama"), "tiny")
    change_config(tmp_path, **changes)
    with pytest.raises(ModelError):
        load_skeleton(folder)


def test_parameters_are_set_and_dropped():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 3))
    weight = torch.arange(6.0).reshape(3, 2)
    set_parameters(layer, {"0.weight": weight})
    assert torch.equal(layer[0].weight, weight)
    with pytest.raises(ModelError, match=r"'0\.weight' has shape \[2, 3\], the config asks for \[3, 2\]"):
        set_parameters(layer, {"0.weight": weight.t()})
    drop_parameters(layer)
    assert layer[0].weight.is_meta
    assert layer[0].weight.shape == (3, 2)


def test_finite_large_numbers_are_finite_even_where_their_sum_is_not():
    assert all_finite(torch.full((1000,), 3e38))
    assert all_finite(torch.empty(0))
    for value in (float("nan"), float("inf"), -float("inf")):
        for position in (0, (1 << 20) - 1, 1 << 20, (1 << 20) + 5):
            tensor = torch.zeros((1 << 20) + 6, dtype=torch.bfloat16)
            tensor[position] = value
            assert not all_finite(tensor)
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))
