"""A whole sub-model folder: what is in it, who can open it, and what is noticed when it is damaged."""

import contextlib
import json
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur.checkpoint.export import export
from secateur.checkpoint.format import LOG, MANIFEST, VERSIONS, check_quantization_config, read_json
from secateur.checkpoint.inspect import inspect, read_manifest
from secateur.checkpoint.shards import read_shard
from secateur.errors import CheckpointError, ModelError, OutputError, SecateurError, UnknownNameError
from secateur.files import sha256_file
from secateur.models.source import resolve_model
from secateur.runtime.loading import load, open_model
from tests.pruning.tiny_derivation import contents, derive_tiny, masks_and_weights
from tests.tiny import FAMILIES, save_tiny

SHARD = "model-00002-of-00004.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("folder") / "base", "qwen2")


@pytest.fixture(scope="module")
def submodel(base):
    derive_tiny(base, base.parent / "out", sparsity=0.55)
    return base.parent / "out"


@pytest.fixture
def copy(submodel, tmp_path):
    return shutil.copytree(submodel, tmp_path / "copy")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_same_state(model, wanted):
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same_weights(model, wanted):
    """As `assert_same_state`, of a model whose pruned weights may be packed: they are unpacked one by one."""
    for name, tensor in wanted.items():
        owner, _, leaf = name.rpartition(".")
        found = getattr(model.get_submodule(owner), leaf)
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.bfloat16) for family in FAMILIES), ("llama", torch.float16),
                          ("gemma3", torch.float32)]
)  # fmt: skip
def test_all_ways_to_open_it_give_the_parents_weights_masked(tmp_path, family, dtype):
    base, out = save_tiny(tmp_path / "base", family, dtype=dtype), tmp_path / "out"
    derive_tiny(base, out)
    wanted = AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict()
    masks = masks_and_weights(out)
    assert len(masks) == 21
    for name, (mask, _) in masks.items():
        assert 0 < int(mask.sum()) < mask.numel()
        wanted[name] = wanted[name].masked_fill(~mask, 0)
    assert {one.dtype for one in wanted.values()} == {dtype}
    opened = AutoModelForCausalLM.from_pretrained(out)
    assert_same_state(opened, wanted)
    assert_same_state(open_model(resolve_model(out)), wanted)
    assert_same_weights(load(out, engine="torch").model, wanted)
    assert_same_state(AutoModelForCausalLM.from_pretrained(export(out, output=tmp_path / "dense")), wanted)
    opened.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert not any(name.endswith(".bitmask") for name in load_file(tmp_path / "again" / "model.safetensors"))
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), wanted)


def test_everything_outside_the_linears_has_the_parents_bits(base, submodel):
    parent = load_file(base / "model.safetensors")
    stored = check_quantization_config(read_json(submodel / "config.json")["quantization_config"])
    child = {}
    for path in sorted(submodel.glob("*.safetensors")):
        child |= read_shard(path, stored)
    assert child.keys() == parent.keys()
    untouched = child.keys() - stored.pruned.shapes.keys()
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.2.self_attn.k_proj.bias"} <= untouched
    for name in untouched:
        assert torch.equal(child[name].view(torch.int16), parent[name].view(torch.int16)), name


def test_an_export_is_a_plain_folder(submodel, tmp_path):
    dense = export(submodel, output=tmp_path / "dense")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert (dense / "tokenizer.json").read_bytes() == (submodel / "tokenizer.json").read_bytes()
    assert not (dense / MANIFEST).exists()
    index = json.loads((dense / INDEX).read_text())
    assert set(index["weight_map"].values()) == {p.name for p in dense.glob("*.safetensors")}
    with pytest.raises(OutputError, match="exists"):
        export(submodel, output=dense)
    with pytest.raises(UnknownNameError, match="unknown export format 'dens': did you mean 'dense'"):
        export(submodel, output=tmp_path / "other", format="dens")


def test_a_submodel_is_no_base(submodel, tmp_path):
    with pytest.raises(ModelError, match=r"already compressed \(secateur\).*export it"):
        derive_tiny(submodel, tmp_path / "out")
    derive_tiny(export(submodel, output=tmp_path / "dense"), tmp_path / "out")


def test_the_manifest_is_written_last(base, tmp_path, monkeypatch):
    written = []
    import secateur.files as files

    real = files.atomic_file

    def spying(path):
        written.append(path.name)
        return real(path)

    monkeypatch.setattr("secateur.files.atomic_file", spying)
    monkeypatch.setattr("secateur.models.safetensors_writer.atomic_file", spying)
    derive_tiny(base, tmp_path / "out")
    assert written[-1] == MANIFEST
    assert written.count(MANIFEST) == 1
    whole = (tmp_path / "out" / MANIFEST).stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= whole for path in (tmp_path / "out").iterdir())


def test_every_file_is_hashed_truly(submodel):
    hashes = json.loads((submodel / MANIFEST).read_text())["files"]
    names = {path.name for path in submodel.iterdir()}
    assert hashes.keys() == names - {MANIFEST, LOG}
    assert names >= {"README.md", "config.json", INDEX, SHARD, "tokenizer.json", "generation_config.json", LOG}
    assert not any("partial" in name or name.startswith("derivation.") for name in names - {LOG})
    for name, expected in hashes.items():
        assert sha256_file(submodel / name) == expected


def test_the_manifest_says_how_it_was_made(base, submodel):
    manifest = json.loads((submodel / MANIFEST).read_text())
    weights = AutoModelForCausalLM.from_pretrained(base)
    assert manifest["base_model"]["name"] == "tiny"
    assert manifest["base_model"]["parameters"] == sum(p.numel() for p in weights.parameters())  # tied ones once
    assert manifest["base_model"]["files"]["model.safetensors"] == sha256_file(base / "model.safetensors")
    assert manifest["recipe"]["sparsity"] == 0.55
    assert manifest["recipe"]["for"] == ["python"]
    assert manifest["values"] == "bf16"
    assert {"secateur", "torch", "transformers"} <= manifest["versions"].keys()
    index = json.loads((submodel / INDEX).read_text())["weight_map"]
    assert index["model.layers.1.mlp.up_proj.weight.bitmask"] == SHARD
    assert index["model.embed_tokens.weight"] == "model-00004-of-00004.safetensors"


def test_two_derivations_give_the_same_bytes_and_none_tells_the_time(base, submodel, tmp_path):
    derive_tiny(base, tmp_path / "out", sparsity=0.55)
    one, two = contents(submodel), contents(tmp_path / "out")
    assert one.keys() == two.keys()
    for name in one:
        assert one[name] == two[name], name
        if not name.endswith(".safetensors"):
            assert not re.search(rb"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d|\"(seconds|finished|time)", one[name]), name
            assert str(tmp_path).encode() not in one[name]
            assert str(submodel.parent).encode() not in one[name]
    log = json.loads((submodel / LOG).read_text())
    assert log["seconds"] > 0
    assert "finished" in log


def test_inspect_adds_up(submodel):
    found = inspect(submodel, verify=True)
    assert found.verified
    assert found.total_bytes == sum(path.stat().st_size for path in submodel.iterdir())
    masks = {name: mask for name, (mask, _) in masks_and_weights(submodel).items()}
    kept, size = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    assert (found.manifest["kept_weights"], found.manifest["prunable_weights"]) == (kept, size)
    assert found.manifest["sparsity"] == pytest.approx(1 - kept / size, abs=1e-6)
    for layer in found.manifest["layers"]:
        mask = masks.pop(layer["name"])
        assert layer["kept"] == int(mask.sum())
        assert layer["shape"] == list(mask.shape)
        assert layer["sparsity"] == pytest.approx(1 - float(mask.float().mean()), abs=1e-6)
    assert not masks
    parts = {}
    for path in submodel.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            suffix = name.rpartition(".")[2]
            part = suffix if suffix in {"bitmask", "values", "row_offsets"} else "dense tensors"
            parts[part] = parts.get(part, 0) + tensor.numel() * tensor.element_size()
    assert {part: found.bytes_by_part[part] for part in parts} == parts
    packed = parts["bitmask"] + parts["values"] + parts["row_offsets"]
    assert found.bits_per_weight == pytest.approx(8 * packed / size)
    assert f"{kept:,} of {size:,}" in found.describe()
    assert found.to_dict()["bytes"] == found.total_bytes


def test_verify_finds_a_flipped_bit_in_any_file(submodel, copy):
    for name in json.loads((submodel / MANIFEST).read_text())["files"]:
        raw = bytearray((submodel / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (copy / name).write_bytes(raw)
        with pytest.raises(CheckpointError):
            inspect(copy, verify=True)
        (copy / name).write_bytes((submodel / name).read_bytes())
    assert inspect(copy, verify=True).verified


def test_verify_names_the_file(copy):
    (copy / "tokenizer.json").write_bytes(b"{}")
    inspect(copy)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json' is damaged: its SHA-256 is"):
        inspect(copy, verify=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", ".", "", "a/../b", "missing.json"])
def test_a_manifest_may_only_name_files_of_its_folder(copy, name):
    (copy.parent / "secret").write_text("x")
    edit(copy / MANIFEST, lambda content: content["files"].update({name: "0" * 64}))
    for verify in (False, True):
        with pytest.raises(CheckpointError, match=r"do not trust it|lacks"):
            inspect(copy, verify=verify)


@pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/hostname", "..", ".", ""])
def test_an_index_may_only_name_files_of_its_folder(copy, tmp_path, name):
    edit(copy / INDEX, lambda content: content["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(SecateurError):
        export(copy, output=tmp_path / "dense")
    with pytest.raises(SecateurError):
        load(copy)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def opens(folder):
    load(folder)


def exports(folder):
    export(folder, output=folder.parent / "dense")


@pytest.mark.parametrize("use", [opens, exports, inspect])
def test_a_truncated_or_missing_shard(copy, use):
    (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:-100])
    with pytest.raises(SecateurError):
        use(copy)
    (copy / SHARD).unlink()
    with pytest.raises(SecateurError, match=SHARD):
        use(copy)
    assert not list(copy.parent.glob("dense*"))


@pytest.mark.parametrize("use", [opens, exports])
def test_a_damaged_packed_weight(copy, use):
    raw = bytearray((copy / SHARD).read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    entry = json.loads(raw[8 : 8 + length])["model.layers.1.mlp.up_proj.weight.bitmask"]
    raw[8 + length + entry["data_offsets"][0]] ^= 1
    (copy / SHARD).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        use(copy)


@pytest.mark.parametrize("use", [opens, exports, inspect])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", max(VERSIONS) + 1),
        ("version", True),
        ("layout", "tiles"),
        ("format", "csr"),
        ("version", None),
        ("shapes", {"a": 1}),
    ],
)
def test_a_foreign_version_is_refused_by_name(copy, key, value, use):
    edit(copy / "config.json", lambda content: content["quantization_config"].update({key: value}))
    with pytest.raises(CheckpointError, match=key):
        use(copy)


@pytest.mark.parametrize("use", [exports, inspect])
def test_a_folder_without_a_manifest_is_not_whole(copy, use):
    (copy / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=f"has no {MANIFEST}"):
        use(copy)
    with pytest.raises(CheckpointError, match="is no folder"):
        read_manifest(copy / "nothing")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": []}', "\xff", "[" * 100_000])
def test_a_manifest_that_is_no_manifest(copy, text):
    (copy / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError):
        inspect(copy)


@pytest.mark.parametrize("key", ["base_model", "recipe", "calibration", "layers", "files", "values", "sparsity"])
def test_a_manifest_that_lacks_something(copy, key):
    edit(copy / MANIFEST, lambda content: content.pop(key))
    with pytest.raises(CheckpointError, match=f"no usable '{key}'"):
        inspect(copy)


@pytest.mark.parametrize("layer", [{"sparsity": "x"}, {"name": None}, {"shape": 3}, {"shape": None}])
def test_a_strange_layer_is_shown_or_refused(copy, layer):
    edit(copy / MANIFEST, lambda content: content["layers"][0].update(layer))
    with contextlib.suppress(SecateurError):
        inspect(copy).describe()


def test_the_card_warns_in_its_first_lines(submodel):
    card = (submodel / "README.md").read_text()
    body = card.split("---\n")[2]
    assert body.startswith("**Write `import secateur` before transformers opens this folder.**")
    assert "random numbers" in body[:250]
    assert f"{json.loads((submodel / MANIFEST).read_text())['sparsity']:.2%} sparsity" in card
    assert 'base_model: "tiny"' in card


@pytest.mark.parametrize("lost", ["model-00002-of-00004.safetensors", "model-00004-of-00004.safetensors"])
def test_export_refuses_an_index_that_leaves_out_a_shard(tmp_path, lost):
    derive_tiny(save_tiny(tmp_path / "base", "llama"), tmp_path / "sub")
    index = read_json(tmp_path / "sub" / INDEX)
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != lost}
    (tmp_path / "sub" / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lack|does not name"):
        export(tmp_path / "sub", output=tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
