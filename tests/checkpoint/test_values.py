"""Whole sub-models in int8 and int4: what is in them, all ways to open them, and what a foreign config meets."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.format import (
    MANIFEST,
    Encoding,
    Stored,
    StoredWeights,
    check_quantization_config,
    quantization_config,
    read_json,
)
from secateur.checkpoint.inspect import inspect
from secateur.checkpoint.quantise import dequantise, quantise
from secateur.errors import CheckpointError
from tests.pruning.tiny_derivation import contents, derive_tiny, interrupt, masks_and_weights
from tests.tiny import FAMILIES, save_tiny

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VALUES = ["int8", "int4", "nl4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("values") / "base", "qwen2")


@pytest.fixture(scope="module")
def submodel(base):
    """A sub-model in int4 and one in int8, by values."""
    for values in VALUES:
        derive_tiny(base, base.parent / values, values=values)
    return {values: base.parent / values for values in VALUES}


@pytest.fixture
def copy(submodel, tmp_path):
    return shutil.copytree(submodel["int4"], tmp_path / "copy")


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def edit_config(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def state(folder, dtype=None):
    return AutoModelForCausalLM.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype})).state_dict()


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.bfloat16) for family in FAMILIES), ("llama", torch.float16),
                          ("qwen3", torch.float32)]
)  # fmt: skip
def test_all_ways_to_open_it_agree(tmp_path, family, dtype, values):
    """transformers in float32 has the exact products; in the model's precision they are rounded once."""
    base, out = save_tiny(tmp_path / "base", family, dtype=dtype), tmp_path / "out"
    derive_tiny(base, out, values=values)
    exact, parent = state(out, torch.float32), state(base, torch.float32)
    stored = masks_and_weights(out)
    assert len(stored) == 21
    for name, (mask, weight) in stored.items():
        assert torch.equal(exact[name], weight), name
        assert not weight[~mask].any()
        error = (weight - parent[name])[mask].norm() / parent[name][mask].norm()
        assert error < (0.012 if values == "int8" else 0.2)
    for name in {EMBEDDING, HEAD}:
        error = (exact[name] - parent[name]).norm() / parent[name].norm()
        assert 0 < error < 0.012
    for name in parent.keys() - stored.keys() - {EMBEDDING, HEAD}:
        assert torch.equal(exact[name], parent[name]), name
    rounded = {name: tensor.to(dtype) for name, tensor in exact.items()}
    dense = export(out, output=tmp_path / "dense")
    for found in (state(out), state(dense), secateur.load(dense, engine="torch").model.state_dict()):
        assert found.keys() == rounded.keys()
        for name, tensor in rounded.items():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("values", VALUES)
def test_the_config_tells_everything(base, submodel, values):
    packed = read_json(submodel[values] / "config.json")["quantization_config"]
    group_size = 128 if values == "int8" else 64
    assert {key: packed[key] for key in ("format", "version", "layout", "values", "group_size")} == {
        "format": "bitmask",
        "version": 3 if values == "nl4" else 1,
        "layout": "rows",
        "values": values,
        "group_size": group_size,
    }
    assert packed["dense"] == {"values": "int8", "group_size": 128, "shapes": {EMBEDDING: [384, 64]}}
    stored = check_quantization_config(packed)
    assert quantization_config(stored) == packed
    found = tensors_of(submodel[values])
    for name, (out_features, in_features) in stored.pruned.shapes.items():
        groups = -(-in_features // group_size)
        assert (found[f"{name}.scales"].dtype, found[f"{name}.scales"].shape) == (
            torch.bfloat16,
            (out_features, groups),
        )
        assert found[f"{name}.values"].dtype == torch.uint8
    assert (found[f"{EMBEDDING}.values"].dtype, found[f"{EMBEDDING}.values"].shape) == (torch.uint8, (384, 64))
    assert found[f"{EMBEDDING}.scales"].shape == (384, 1)
    assert EMBEDDING not in found
    assert not any(name.startswith("lm_head") for name in found), "a tied head is stored once"
    assert json.loads((submodel[values] / MANIFEST).read_text())["values"] == values


@pytest.mark.parametrize("group_size", [32, 128])
def test_a_group_size_that_is_asked_for(base, tmp_path, group_size):
    done = derive_tiny(base, tmp_path / "out", values="int4", group_size=group_size)
    assert done.manifest["recipe"]["group_size"] == group_size
    assert tensors_of(tmp_path / "out")["model.layers.0.mlp.down_proj.weight.scales"].shape == (
        64,
        -(-160 // group_size),
    )
    assert set(state(tmp_path / "out")) == set(state(base))


def test_an_untied_head_is_stored_and_opened(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    derive_tiny(base, tmp_path / "out", values="int8")
    packed = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert packed["dense"]["shapes"] == {EMBEDDING: [384, 64], HEAD: [384, 64]}
    found, parent = state(tmp_path / "out", torch.float32), load_file(base / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        wanted = dequantise(
            quantise(parent[name], None, None, values="int8", group_size=128), values="int8", group_size=128
        )
        assert torch.equal(found[name], wanted)


def test_a_head_that_differs_from_the_embedding_it_is_said_to_be_tied_to(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    edit_config(base, lambda config: config.update(tie_word_embeddings=True))
    weights = load_file(base / "model.safetensors")
    weights[HEAD] = weights[EMBEDDING] * 2
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    derive_tiny(base, tmp_path / "out", values="int8", sparsity=0.0)
    packed = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert packed["dense"]["shapes"].keys() == {EMBEDDING, HEAD}
    found = state(tmp_path / "out")
    assert torch.equal(found[HEAD], 2 * found[EMBEDDING])


@pytest.mark.parametrize(("values", "error"), [("int8", 0.012), ("int4", 0.12)])
def test_a_dense_parent_in_integers_has_no_bitmask(base, tmp_path, values, error):
    done = derive_tiny(base, tmp_path / "out", values=values, sparsity=0.0)
    assert done.manifest["sparsity"] == 0
    assert done.manifest["kept_weights"] == done.manifest["prunable_weights"]
    parent, child = state(base, torch.float32), state(tmp_path / "out", torch.float32)
    weights = masks_and_weights(tmp_path / "out")
    for name, (_, weight) in weights.items():
        assert (child[name] - parent[name]).norm() / parent[name].norm() < error
        assert torch.equal(child[name], weight)
    assert not [name for name in tensors_of(tmp_path / "out") if name.endswith((".bitmask", ".row_offsets"))]
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert (config["version"], config["unmasked"]) == (2, list(config["shapes"]))
    found = inspect(tmp_path / "out", verify=True)
    assert found.bytes_by_part["bitmask"] == found.bytes_by_part["row_offsets"] == 0
    assert found.bytes_by_part["values"] == found.manifest["prunable_weights"] * (8 if values == "int8" else 4) // 8
    assert "without a bitmask" in found.describe()
    export(tmp_path / "out", output=tmp_path / "dense")
    assert all(torch.equal(child[name].bfloat16(), one) for name, one in state(tmp_path / "dense").items())


@pytest.mark.parametrize("values", VALUES)
def test_a_mask_that_keeps_all_gives_the_weights_of_none(base, tmp_path, values):
    """A sparsity that rounds to no entry at all is stored with a bitmask; codes and scales are the same."""
    derive_tiny(base, tmp_path / "with", values=values, sparsity=1e-6)
    derive_tiny(base, tmp_path / "without", values=values, sparsity=0.0)
    masked, unmasked = tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without")
    assert masked.keys() > unmasked.keys()
    first, second = state(tmp_path / "with", torch.float32), state(tmp_path / "without", torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("values", VALUES)
def test_a_dense_parent_goes_on_to_the_same_bytes(base, tmp_path, values):
    derive_tiny(base, tmp_path / "whole", values=values, sparsity=0.0)
    interrupt(base, tmp_path / "cut", values=values, sparsity=0.0)
    derive_tiny(base, tmp_path / "cut", values=values, sparsity=0.0, resume=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("values", VALUES)
def test_inspect_adds_up(submodel, values):
    found = inspect(submodel[values], verify=True)
    assert found.total_bytes == sum(path.stat().st_size for path in submodel[values].iterdir())
    tensors = tensors_of(submodel[values])
    parts = {}
    for name, tensor in tensors.items():
        owner, _, suffix = name.rpartition(".")
        part = suffix if f"{owner}.bitmask" in tensors else "dense tensors"
        parts[part] = parts.get(part, 0) + tensor.numel() * tensor.element_size()
    assert {part: found.bytes_by_part[part] for part in parts} == parts
    assert parts.keys() == {"bitmask", "values", "row_offsets", "scales", "dense tensors"}
    packed = sum(size for part, size in parts.items() if part != "dense tensors")
    masks = [mask for mask, _ in masks_and_weights(submodel[values]).values()]
    size, kept = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
    assert found.bits_per_weight == pytest.approx(8 * packed / size)
    assert found.manifest["kept_weights"] == kept, "int4 bytes are not weights"
    text = found.describe()
    assert f"{values} in groups of" in text
    assert "embedding and head int8 in groups of 128" in text
    assert f"{8 * parts['scales'] / size:.3f}" in text


def test_the_card_says_what_was_rounded(submodel):
    card = (submodel["int4"] / "README.md").read_text()
    assert "| values | int4, groups of 64 |" in card
    assert "embedding and head are the parent's in int8" in card
    assert "powers of two that the weights around them make up for" in card


def test_two_derivations_give_the_same_bytes(base, submodel, tmp_path):
    derive_tiny(base, tmp_path / "out", values="int4")
    one, two = contents(submodel["int4"]), contents(tmp_path / "out")
    assert one == two


FOREIGN = {
    "values unknown": (lambda packed: packed.update(values="int3"), "values 'int3'"),
    "values no text": (lambda packed: packed.update(values=["int4"]), "values"),
    "values missing": (lambda packed: packed.pop("values"), "values None"),
    "group size unknown": (lambda packed: packed.update(group_size=48), "group_size 48"),
    "group size missing": (lambda packed: packed.pop("group_size"), "group_size None"),
    "group size no integer": (lambda packed: packed.update(group_size=64.0), "group_size 64.0"),
    "group size a list": (lambda packed: packed.update(group_size=[64]), "group_size"),
    "floats with groups": (lambda packed: packed.update(values="bf16"), "group_size 64"),
    "dense no object": (lambda packed: packed.update(dense=[1]), "dense"),
    "dense of other values": (lambda packed: packed["dense"].update(values="int4"), "dense"),
    "dense of other groups": (lambda packed: packed["dense"].update(group_size=7), "group_size 7"),
    "dense without shapes": (lambda packed: packed["dense"].pop("shapes"), "shapes"),
    "dense of a strange shape": (lambda packed: packed["dense"]["shapes"].update({EMBEDDING: [384, -64]}), "shapes"),
    "pruned and dense": (
        lambda packed: packed["dense"]["shapes"].update({"model.layers.0.mlp.up_proj.weight": [160, 64]}),
        "twice",
    ),
}


def opens(folder):
    secateur.load(folder, engine="torch")


def exports(folder):
    export(folder, output=folder.parent / "dense")


@pytest.mark.parametrize("use", [opens, exports, inspect])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_format_is_refused_by_name(copy, case, use):
    change, says = FOREIGN[case]
    edit_config(copy, lambda config: change(config["quantization_config"]))
    with pytest.raises(CheckpointError, match=says):
        use(copy)


@pytest.mark.parametrize("use", [opens, exports])
@pytest.mark.parametrize(
    "lie",
    [
        {"values": "int8", "group_size": 64},
        {"group_size": 32},
        {"dense": {"values": "int8", "group_size": 32, "shapes": {EMBEDDING: [384, 64]}}},
        {"dense": {"values": "int8", "group_size": 128, "shapes": {EMBEDDING: [384, 63]}}},
        {"dense": {"values": "int8", "group_size": 128, "shapes": {}}},
    ],
)  # fmt: skip
def test_a_config_that_does_not_match_the_tensors(copy, lie, use):
    edit_config(copy, lambda config: config["quantization_config"].update(lie))
    with pytest.raises(CheckpointError, match=r"model\.(layers|embed)"):
        use(copy)


@pytest.mark.parametrize("use", [opens, exports])
def test_a_scale_that_is_not_finite(copy, use):
    for path in sorted(copy.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(".scales")]  # noqa: SIM118 - not a mapping
        if names:
            tensors = load_file(path)
            tensors[names[0]].view(-1)[-1] = torch.inf
            save_file(tensors, path, {"format": "pt"})
            break
    with pytest.raises(CheckpointError, match="scales hold NaN or infinity"):
        use(copy)


def test_export_needs_to_know_the_precision(copy, tmp_path):
    edit_config(copy, lambda config: config.update(dtype="int7"))
    with pytest.raises(CheckpointError, match="names the precision 'int7'"):
        export(copy, output=tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_config_from_before_there_were_integers():
    """It has no group_size and no dense matrices."""
    shapes = {"a.weight": (2, 5)}
    old = {
        "quant_method": "secateur",
        "format": "bitmask",
        "version": 1,
        "layout": "rows",
        "values": "bf16+fp32",
    }
    found = check_quantization_config({**old, "shapes": {"a.weight": [2, 5]}})
    assert found == Stored(StoredWeights(Encoding("bf16+fp32"), shapes))
    assert found.pruned.encoding.bits == 0
    assert quantization_config(found) == {**old, "shapes": {"a.weight": [2, 5]}}, "and a new one still looks like it"


@pytest.mark.parametrize("version", [1, 2])
def test_levels_that_are_not_even_need_the_third_version(submodel, tmp_path, version):
    packed = read_json(submodel["nl4"] / "config.json")["quantization_config"]
    with pytest.raises(CheckpointError, match="earlier version 'nl4'"):
        check_quantization_config(packed | {"version": version})
    assert check_quantization_config(packed).pruned.encoding.values == "nl4"
