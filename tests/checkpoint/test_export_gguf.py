"""A sub-model exported as GGUF comes back from our own reader with the same weights, settings and tokens."""

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig

from secateur.checkpoint import export_gguf
from secateur.checkpoint.export import export
from secateur.checkpoint.format import INDEX, check_quantization_config, read_json
from secateur.checkpoint.shards import read_shard
from secateur.errors import CheckpointError, ConfigError, ModelError, OutputError, UnknownNameError
from secateur.models.gguf_file import GGUFFile
from secateur.models.source import resolve_model
from tests.checkpoint.gguf_bases import save_base
from tests.pruning.tiny_derivation import derive_tiny
from tests.tiny import save_tiny

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": False},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def submodel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    derive_tiny(save_base(folder / "base", "llama"), folder / "sub")
    return folder / "sub"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of an ordinary folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def exact(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a sub-model, integers as the float32 that they are."""
    stored = check_quantization_config(read_json(folder / "config.json")["quantization_config"])
    return {name: one for file in folder.glob("*.safetensors") for name, one in read_shard(file, stored).items()}


def matrices(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return type and values, float32 [out, in], of the matrices in a GGUF by their names there."""
    file = GGUFFile(path)
    pairs = {name: tensor for name, tensor in file.tensors.items() if len(tensor.shape) == 2}
    return {name: (one.kind.name, file.rows(one, 0, one.shape[0])) for name, one in pairs.items()}


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", "base"),
        ("llama", "int4"),
        ("mistral", "int8"),
        ("qwen2", "base"),
        ("qwen2", "int4"),
        ("qwen3", "int8"),
    ],
)
def test_it_comes_back_as_it_was(family, values, tmp_path):
    base, sub = save_base(tmp_path / "base", family, **FAMILIES[family]), tmp_path / "sub"
    derive_tiny(base, sub, values=values)
    back = resolve_model(export(sub, output=tmp_path / "new" / "sub.gguf", format="gguf")).path
    wanted, found = weights(export(sub, output=tmp_path / "dense")), weights(back)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    old, new = AutoConfig.from_pretrained(base).to_dict(), AutoConfig.from_pretrained(back).to_dict()
    unset = {"eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_name_or_path", "use_cache"}
    # Beyond its window llama.cpp computes a Mistral otherwise.
    changed = {"max_position_embeddings": old["sliding_window"]} if family == "mistral" else {}
    assert {key: value for key, value in new.items() if key not in unset and old.get(key) != value} == changed
    ours, theirs = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (back, sub))
    assert ours.get_vocab() == theirs.get_vocab()
    settings = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (sub, back)]
    assert settings[1] == settings[0] | {"model_max_length": new["max_position_embeddings"]}
    assert (back / "chat_template.jinja").read_text() == (sub / "chat_template.jinja").read_text()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sub.gguf"]


@pytest.mark.parametrize(
    ("values", "embedding", "kinds"),
    [
        ("base", None, {"F16"}),
        ("int8", None, {"Q8_0"}),
        ("int4", None, {"Q4_0", "Q8_0"}),
        ("int4", "int4", {"Q4_0"}),
    ],
)
def test_types_hold_the_stored_values_exactly(values, embedding, kinds, tmp_path):
    base = save_base(tmp_path / "base", "qwen2", dtype=torch.float16)
    derive_tiny(base, tmp_path / "sub", values=values, embedding_values=embedding)
    found = matrices(export(tmp_path / "sub", output=tmp_path / "sub.gguf", format="gguf"))
    wanted = exact(tmp_path / "sub")
    assert {kind for kind, _ in found.values()} == kinds
    assert found["token_embd.weight"][0] == ("F16" if values == "base" else "Q4_0" if embedding else "Q8_0")
    for name, other in (("blk.1.attn_q", "self_attn.q_proj"), ("blk.1.ffn_down", "mlp.down_proj")):
        weight = wanted[f"model.layers.1.{other}.weight"].float().numpy()
        np.testing.assert_array_equal(found[f"{name}.weight"][1], weight)
    np.testing.assert_array_equal(found["token_embd.weight"][1], wanted["model.embed_tokens.weight"].float().numpy())


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("values", ["base", "int4", "nl4"])
def test_a_type_that_is_asked_for(kind, values, tmp_path):
    derive_tiny(save_base(tmp_path / "base", "qwen2"), tmp_path / "sub", values=values)
    found = matrices(export(tmp_path / "sub", output=tmp_path / "sub.gguf", format="gguf", type=kind))
    wanted = exact(tmp_path / "sub")["model.layers.2.mlp.up_proj.weight"].float()
    got = torch.from_numpy(found["blk.2.ffn_up.weight"][1])
    assert {one for one, _ in found.values()} == {kind.upper()}
    if kind == "q8_0":
        atol = 0.0 if values in {"int4", "nl4"} else wanted.abs().max().item() / 127
        torch.testing.assert_close(got, wanted, atol=atol, rtol=0.0)
    else:
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
        assert torch.equal(got, wanted.to(dtype).float())


def test_rows_that_blocks_do_not_divide_get_the_precision_of_the_base(tmp_path):
    base = save_base(tmp_path / "base", "llama", intermediate_size=72)
    derive_tiny(base, tmp_path / "sub", values="int8")
    found = matrices(export(tmp_path / "sub", output=tmp_path / "sub.gguf", format="gguf"))
    kinds = {name: kind for name, (kind, _) in found.items() if name.startswith("blk.0.ffn")}
    assert kinds == {"blk.0.ffn_down.weight": "BF16", "blk.0.ffn_gate.weight": "Q8_0", "blk.0.ffn_up.weight": "Q8_0"}
    wanted = exact(tmp_path / "sub")["model.layers.0.mlp.down_proj.weight"].bfloat16().float()
    assert torch.equal(torch.from_numpy(found["blk.0.ffn_down.weight"][1]), wanted)


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_damaged_weights_are_named_and_not_blamed_on_the_type(submodel, tmp_path, kind, number):
    copytree(submodel, tmp_path / "sub")
    path = max((tmp_path / "sub").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][3, 5] = number
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' holds NaN or infinity"):
        export(tmp_path / "sub", output=tmp_path / "sub.gguf", format="gguf", type=kind)
    assert not list(tmp_path.glob("sub.gguf*"))


@pytest.mark.parametrize(("scale", "message"), [(1e-9, "too small for Q8_0"), (1e6, "too large for Q8_0")])
def test_scales_that_half_precision_cannot_hold(tmp_path, scale, message):
    derive_tiny(save_base(tmp_path / "base", "llama"), tmp_path / "sub", values="int8")
    for path in (tmp_path / "sub").glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("mlp.up_proj.weight.scales"):
                tensors[name].fill_(scale)
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        export(tmp_path / "sub", output=tmp_path / "sub.gguf", format="gguf")


def test_floats_beyond_what_q8_0_can_scale(submodel, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 5] = 1e30
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    derive_tiny(base, tmp_path / "sub", method="magnitude", sparsity=0.2)
    with pytest.raises(ConfigError, match="too large for Q8_0"):
        export(tmp_path / "sub", output=tmp_path / "sub.gguf", format="gguf", type="q8_0")


def test_the_same_sub_model_gives_the_same_bytes(submodel, tmp_path):
    files = [export(submodel, output=tmp_path / name, format="gguf") for name in ("a.gguf", "b.gguf")]
    assert files[0].read_bytes() == files[1].read_bytes()
    metadata = GGUFFile(files[0]).metadata
    assert metadata["general.name"] == "tiny"
    assert metadata["general.file_type"] == 32  # mostly bf16


def test_values_beyond_half_precision_are_refused(submodel, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    derive_tiny(base, tmp_path / "sub", sparsity=0.2)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight.*too large for F16.*bf16"):
        export(tmp_path / "sub", output=tmp_path / "sub.gguf", format="gguf", type="f16")
    assert not list(tmp_path.glob("sub.gguf*"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output": "sub", "format": "gguf"}, OutputError, r"ends in \.gguf, sub\.gguf"),
        ({"output": "sub.gguf"}, OutputError, "--format gguf"),
        ({"output": "sub", "type": "q8_0"}, ConfigError, "'q8_0' is for the format gguf"),
        ({"output": "sub.gguf", "format": "gguf", "type": "q8"}, UnknownNameError, "did you mean 'q8_0'"),
        ({"output": "sub.gguf", "format": "guf"}, UnknownNameError, "did you mean 'gguf'"),
        ({"output": "there.gguf", "format": "gguf"}, OutputError, "exists"),
    ],
)
def test_options_that_do_not_go_together(submodel, tmp_path, options, error, message):
    (tmp_path / "there.gguf").write_bytes(b"mine")
    options |= {"output": tmp_path / options["output"]}
    with pytest.raises(error, match=message):
        export(submodel, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"


def test_nothing_is_left_when_it_breaks_half_way(submodel, tmp_path, monkeypatch):
    load = export_gguf._load

    def breaks(*arguments):
        if "layers.1" in arguments[1]:
            raise OSError(28, "No space left on device")
        return load(*arguments)

    monkeypatch.setattr(export_gguf, "_load", breaks)
    with pytest.raises(OutputError, match="No space left on device"):
        export(submodel, output=tmp_path / "deep" / "sub.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_another_family_is_refused_by_name(tmp_path):
    derive_tiny(save_tiny(tmp_path / "base", "gemma2"), tmp_path / "sub")
    with pytest.raises(ModelError, match=r"'gemma2' cannot be written.*llama, mistral, qwen2, qwen3.*--format dense"):
        export(tmp_path / "sub", output=tmp_path / "sub.gguf", format="gguf")
    assert not list(tmp_path.glob("sub.gguf*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "hold, beside"),
        ({"num_hidden_layers": 4}, "lack"),
        ({"num_key_value_heads": 4}, "shape"),
    ],
)
def test_a_config_that_is_not_of_these_weights(submodel, tmp_path, change, message):
    copy = copytree(submodel, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        export(copy, output=tmp_path / "sub.gguf", format="gguf")


def test_an_index_that_leaves_out_a_shard(submodel, tmp_path):
    copy = copytree(submodel, tmp_path / "copy")
    index = read_json(copy / INDEX)
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if "00002" not in shard}
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lack"):
        export(copy, output=tmp_path / "sub.gguf", format="gguf")


def test_one_dimensional_tensors_are_float32(submodel, tmp_path):
    file = GGUFFile(export(submodel, output=tmp_path / "sub.gguf", format="gguf", type="q8_0"))
    assert {one.kind for one in file.tensors.values() if len(one.shape) == 1} == {GGMLQuantizationType.F32}
