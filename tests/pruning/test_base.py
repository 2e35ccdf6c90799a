"""Bases that are not the plain case: a head that only says it is tied, mixed precisions, interrupted in odd ways."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secateur.checkpoint.format import STATE, read_json
from secateur.errors import CheckpointError, ConfigError, ModelError
from secateur.pruning.base import Base
from tests.pruning.tiny_derivation import calibration, contents, derive_tiny, interrupt, masks_and_weights, shards
from tests.tiny import save_tiny


def change_weights(base, change):
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def change_config(base, **values):
    config = json.loads((base / "config.json").read_text())
    for key, value in values.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    (base / "config.json").write_text(json.dumps(config))


def tied_base(tmp_path, head):
    """A base that says it is tied and stores a head as well: a copy of the embedding times `head`."""
    base = save_tiny(tmp_path / "base", "llama")
    change_config(base, tie_word_embeddings=True)
    change_weights(base, lambda w: w.update({"lm_head.weight": (w["model.embed_tokens.weight"] * head).clone()}))
    return base


@pytest.mark.parametrize(("head", "stored"), [(1, False), (2, True)])
def test_a_head_beside_a_tied_embedding_is_dropped_only_if_it_is_the_same(tmp_path, head, stored):
    base = tied_base(tmp_path, head)
    derive_tiny(base, tmp_path / "out", sparsity=0.0)
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert ("lm_head.weight" in index["weight_map"]) is stored
    ids = torch.arange(20)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (base, tmp_path / "out")
    ]  # parent and child see the same checkpoint, whatever transformers makes of it
    assert torch.equal(*logits)


def test_each_weight_keeps_its_own_precision(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    exact = torch.randn(64, 160, generator=torch.Generator().manual_seed(0))
    change_weights(base, lambda weights: weights.update({name: exact}))
    submodel = derive_tiny(base, tmp_path / "out", sparsity=0.0)
    _, weight = masks_and_weights(tmp_path / "out")[name]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, exact)
    assert submodel.manifest["values"] == "bf16+fp32"


def test_a_config_without_a_precision_gets_that_of_the_weights(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    change_config(base, dtype=None, torch_dtype=None)
    change_weights(base, lambda w: w.update({k: v.float() for k, v in w.items() if "norm" in k}))
    derive_tiny(base, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_another_device_does_not_resume(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    partial = interrupt(base, tmp_path / "out")
    state = read_json(partial / STATE)
    assert state["device"] == "cpu"
    (partial / STATE).write_text(json.dumps({**state, "device": "cuda"}))
    with pytest.raises(ConfigError, match='device, "cuda" instead of "cpu"'):
        derive_tiny(base, tmp_path / "out", resume=True)
    assert len(shards(partial)) == 2


def test_a_damaged_shard_is_made_again(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    derive_tiny(base, tmp_path / "whole")
    partial = interrupt(base, tmp_path / "out")
    shard = sorted(partial.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    derive_tiny(base, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("error", [RuntimeError("boom"), CheckpointError("damaged"), ModelError("bad")])
def test_an_error_in_a_resumed_run_keeps_the_finished_blocks(tmp_path, error):
    base = save_tiny(tmp_path / "base", "llama")
    partial = interrupt(base, tmp_path / "out")
    before = shards(partial)
    (partial / "stray").mkdir()

    def fail(stage, done, _):
        if (stage, done) == ("prune", 2):
            raise error

    with pytest.raises(type(error)):
        derive_tiny(base, tmp_path / "out", resume=True, progress=fail)
    assert shards(partial) == before


def test_parents_that_a_failed_run_made_are_removed(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    change_weights(base, lambda weights: weights["lm_head.weight"].view(-1)[0].fill_(float("nan")))
    with pytest.raises(ModelError):
        derive_tiny(base, tmp_path / "a" / "b" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_forecast_comes_before_any_weight_is_read(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base", "llama")
    order = []
    monkeypatch.setattr("secateur.pruning.derive.sha256_file", lambda path: order.append(path.name) or "0" * 64)
    real = Base.stored_names
    monkeypatch.setattr(Base, "stored_names", lambda self: order.append("weights") or real(self))
    derive_tiny(base, tmp_path / "out", announce=lambda line: order.append("forecast"))
    assert order[0] == "forecast"
    assert {"model.safetensors", "weights"} <= set(order)


def test_negative_tokens_are_refused(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    tokens = calibration()
    tokens.token_ids[0, 0] = np.int64(-1)
    with pytest.raises(ModelError, match="holds token -1"):
        derive_tiny(base, tmp_path / "out", calibration=tokens)
    assert not os.path.lexists(tmp_path / "out.partial")


@pytest.mark.parametrize("said", ["gptq", {"quant_method": "awq"}])
def test_a_base_that_is_quantised_is_refused_by_name(tmp_path, said):
    base = save_tiny(tmp_path / "base", "llama")
    change_config(base, quantization_config=said)
    with pytest.raises(ModelError, match=r"already compressed \((gptq|awq)\)"):
        derive_tiny(base, tmp_path / "out")
