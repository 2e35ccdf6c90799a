"""Embedding and head in int4: stored, opened by every reader, exported, and refused where it cannot be."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.dense import DenseWeight, unpack_dense
from secateur.checkpoint.export import export
from secateur.checkpoint.format import Encoding, check_quantization_config
from secateur.checkpoint.quantise import dequantise, quantise
from secateur.checkpoint.shards import read_shard
from secateur.config import make_recipe
from secateur.errors import CheckpointError, ConfigError
from secateur.models.source import resolve_model
from secateur.runtime.loading import open_model
from secateur.runtime.native_model import NativeSequence
from tests.calibration.texts import write_folder
from tests.pruning.tiny_derivation import calibration, derive_tiny
from tests.runtime.native_models import native, reference_logits, sub_model, tokens
from tests.tiny import save_tiny

SMALL = {"values": "int4", "embedding_values": "int4"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sub-models with a tied and with an untied head, by the name of their family; and the first one trimmed."""
    root = tmp_path_factory.mktemp("small")
    text = write_folder(root / "text", [f"{number}.py" for number in range(12)])
    found = {}
    for family in ("qwen2", "llama"):
        found[family] = sub_model(save_tiny(root / family, family), text, root / f"{family}-sub", **SMALL)
    found["trimmed"] = sub_model(root / "qwen2", text, root / "trimmed", trim_vocabulary=True, **SMALL)
    return found


def near(found, expected):
    """Activations are rounded to 8 bits for each product."""
    return float(np.square(found - expected).mean()) < 0.04**2 * float(np.square(expected).mean())


def config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", ["qwen2", "llama", "trimmed"])
def test_the_stored_embedding_is_the_rounded_one(folders, name):
    said = config(folders[name])
    assert said["version"] == 2
    assert (said["dense"]["values"], said["dense"]["group_size"]) == ("int4", 32)
    shard = sorted(folders[name].glob("*.safetensors"))[-1]
    base = folders[name].parent / ("qwen2" if name == "trimmed" else name)
    parent = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    found = read_shard(shard, check_quantization_config(said))
    for weight in said["dense"]["shapes"]:
        codes = quantise(parent[weight], None, None, values="int4", group_size=32)
        assert torch.equal(found[weight], dequantise(codes, values="int4", group_size=32))


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_all_readers_compute_the_same(folders, name):
    ids = tokens(40)
    expected = reference_logits(folders[name], ids)
    model = native(folders[name]).model
    sequence = NativeSequence(model, 40)
    assert near(model.forward(ids, [sequence] * 40, [True] * 40), expected)
    packed = open_model(resolve_model(str(folders[name])), packed=True)
    with torch.inference_mode():
        found = packed(torch.tensor([ids])).logits[0].float().numpy()
    assert near(found, expected)


def test_a_trimmed_head_is_run(folders):
    assert secateur.load(folders["trimmed"]).generate("def f0(", max_new_tokens=4)
    wanted = AutoModelForCausalLM.from_pretrained(folders["trimmed"], dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.float32)
    for (name, ours), (_, theirs) in zip(wanted.named_parameters(), full.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_dense_export_holds_the_same_numbers(folders, tmp_path):
    export(folders["llama"], output=tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32).to(torch.bfloat16).float()
    for (name, one), (_, other) in zip(dense.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_it_saves_what_it_says(folders, tmp_path):
    text = folders["llama"].parent / "text"
    plain = sub_model(folders["llama"].parent / "llama", text, tmp_path / "plain", values="int4")
    size = {path: sum(one.stat().st_size for one in path.glob("*.safetensors")) for path in (plain, folders["llama"])}
    shapes = config(plain)["dense"]["shapes"].values()
    # int8 in groups of 128, of which there is one in a narrow row, and int4 in groups of 32.
    saved = sum(rows * (columns // 2 - 2 * (columns // 32 - -(-columns // 128))) for rows, columns in shapes)
    assert size[plain] - size[folders["llama"]] == pytest.approx(saved, abs=256)


def test_recovery_learns_beside_the_rounded_embedding(tmp_path):
    base = save_tiny(tmp_path / "base")
    learnt = derive_tiny(base, tmp_path / "out", recovery=calibration(samples=2, seed=1), **SMALL)
    assert config(learnt.path)["dense"]["values"] == "int4"
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(learnt.path)(torch.tensor([tokens(20)])).logits).all()


@pytest.mark.parametrize("changes", [{"values": "base"}, {}])
def test_floats_beside_it_are_refused(changes):
    with pytest.raises(ConfigError, match=r"embedding_values.*base values"):
        make_recipe({"for": "python", "embedding_values": "int4", **changes})


def test_a_size_that_the_whole_model_fits_has_no_integers(tmp_path):
    base = save_tiny(tmp_path / "base")
    done = derive_tiny(base, tmp_path / "out", target_size="50MB", embedding_values="int4")
    assert (done.manifest["values"], done.manifest["recipe"]["embedding_values"]) == ("bf16", "int8")


def test_version_1_does_not_know_it(folders):
    with pytest.raises(CheckpointError, match="dense"):
        check_quantization_config({**config(folders["qwen2"]), "version": 1})


def test_damaged_codes_are_refused(folders):
    weight = DenseWeight(torch.zeros(4, 17, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.bfloat16))
    unpack_dense(weight, (4, 33), "embedding", Encoding("int4", 32))
    weight.values[2, 16] = 0x10  # beyond the last column
    with pytest.raises(CheckpointError, match="embedding"):
        unpack_dense(weight, (4, 33), "embedding", Encoding("int4", 32))
