"""Derivations in int8 and int4: what is minimised, what later blocks see, going on after an interruption, quality."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur.calibration.statistics import InputStatistics
from secateur.checkpoint.format import MANIFEST, STATE
from secateur.checkpoint.quantise import dequantise, quantise
from secateur.errors import ConfigError, OutputError
from secateur.pruning import weight as step
from tests.pruning.test_reference import reference_masks
from tests.pruning.tiny_derivation import (
    Interrupt,
    calibration,
    contents,
    derive_tiny,
    interrupt,
    masks_and_weights,
    shards,
)
from tests.tiny import save_tiny

GROUPS = {"int8": 128, "int4": 64, "nl4": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("values") / "base", "qwen2", dtype=torch.float32)


@pytest.fixture(scope="module")
def derived(base):
    """Sub-models of the same recipe but for their values."""
    for values in ("base", "int8", "int4", "nl4"):
        derive_tiny(base, base.parent / f"sub-{values}", values=values)
    return {values: base.parent / f"sub-{values}" for values in ("base", "int8", "int4", "nl4")}


@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("values", ["int8", "int4", "nl4"])
def test_later_blocks_see_what_is_stored(base, tmp_path, values, propagate):
    """Against the reference of the masks: each weight is quantised with its own inputs, and then takes part."""
    derive_tiny(base, tmp_path / "out", values=values, propagate=propagate)
    found = masks_and_weights(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def written(name, mask, sum_squares):
        how = {"values": values, "group_size": GROUPS[values]}
        wanted = dequantise(quantise(dense[name], mask, sum_squares, **how), **how) * mask
        stored = found[name][1]
        # The sums differ in their last bits, which may turn a scale; then it fits about as well.
        same = (wanted == stored).float().mean()
        assert same > 0.97, (name, same)
        return stored

    options = {"propagate": propagate, "granularity": "per_output", "sparsity": 0.5, "written": written}
    wanted = reference_masks(model, torch.from_numpy(calibration().token_ids), **options)
    for name, mask in wanted.items():
        assert torch.equal(found[name][0], mask), name


def test_masks_of_the_first_block_do_not_depend_on_values_and_later_ones_do(derived):
    masks = {values: masks_and_weights(folder) for values, folder in derived.items()}
    for name, (mask, _) in masks["base"].items():
        if ".layers.0." in name:
            assert torch.equal(mask, masks["int4"][name][0])
    assert any(not torch.equal(mask, masks["int4"][name][0]) for name, (mask, _) in masks["base"].items())


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_methods_without_statistics_count_all_inputs_alike(base, tmp_path, method):
    derive_tiny(base, tmp_path / "out", values="int4", method=method)
    parent = load_file(base / "model.safetensors")
    for name, (mask, weight) in masks_and_weights(tmp_path / "out").items():
        wanted = dequantise(
            quantise(parent[name], mask, None, values="int4", group_size=64), values="int4", group_size=64
        )
        assert torch.equal(weight, wanted * mask), name


def test_what_is_put_into_the_block_is_what_a_reader_unpacks():
    """In the block's precision, bit for bit: a resumed run takes it from the shard."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 100, generator=generator).bfloat16()
    pruned = step.Pruned(weight, torch.rand(20, 100, generator=generator) < 0.5)
    statistics = InputStatistics(torch.rand(100, generator=generator), 7)
    encoding = step.Encoding("int4", 32)
    codes = step._quantise(encoding, step.Target(0.5), pruned, statistics, weight)
    packed, kept = step.pack_weight(encoding, "w", pruned, codes, torch.bfloat16)
    assert kept.dtype == torch.bfloat16
    exact, mask = step.unpack(packed, (20, 100), "w", encoding)
    assert torch.equal(kept, exact.bfloat16())
    assert torch.equal(mask, pruned.mask)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("values", ["int8", "int4", "nl4"])
def test_going_on_gives_the_same_bytes(tmp_path, family, values):
    base = save_tiny(tmp_path / "base", family)
    derive_tiny(base, tmp_path / "whole", values=values)
    for block in (1, 2, 3):  # the last: everything but the shard outside the blocks is there
        partial = interrupt(base, tmp_path / f"out{block}", block, values=values)
        assert len(shards(partial)) == block
        derive_tiny(base, tmp_path / f"out{block}", values=values, resume=True)
        assert contents(tmp_path / f"out{block}") == contents(tmp_path / "whole")


def test_a_damaged_shard_is_made_again(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    derive_tiny(base, tmp_path / "whole", values="int4")
    partial = interrupt(base, tmp_path / "out", values="int4")
    shard = sorted(partial.glob("*.safetensors"))[1]
    raw = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])["model.layers.1.mlp.up_proj.weight.scales"]["data_offsets"]
    raw[start + entry[0] : start + entry[1]] = b"\xff" * (entry[1] - entry[0])
    shard.write_bytes(raw)
    derive_tiny(base, tmp_path / "out", values="int4", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["header", "scales"])
def test_a_damaged_outer_shard_is_made_again(base, tmp_path, monkeypatch, damage):
    derive_tiny(base, tmp_path / "whole", values="int4")

    def stop(*_):
        raise Interrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr("secateur.pruning.job.finish_submodel", stop)
        derive_tiny(base, tmp_path / "out", values="int4")
    shard = max((tmp_path / "out.partial").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])["model.embed_tokens.weight.scales"]["data_offsets"]
    first, last = (8, 40) if damage == "header" else (start + entry[0], start + entry[1])
    raw[first:last] = b"\xff" * (last - first)
    shard.write_bytes(raw)
    derive_tiny(base, tmp_path / "out", values="int4", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_values_do_not_resume(base, tmp_path):
    partial = interrupt(base, tmp_path / "out", values="int4")
    before = shards(partial)
    for options, named in (
        ({}, r"recipe \(values\), \"int4\" instead of \"base\""),
        ({"values": "int4", "group_size": 32}, r"recipe \(group_size\), 64 instead of 32"),
    ):
        with pytest.raises(ConfigError, match=f"begun with another {named}"):
            derive_tiny(base, tmp_path / "out", resume=True, **options)
    assert shards(partial) == before
    derive_tiny(base, tmp_path / "out", resume=True, values="int4", group_size=64)  # which is the default
    with pytest.raises(OutputError, match=r"made with another recipe \(values\)"):
        derive_tiny(base, tmp_path / "out", resume=True)


@pytest.mark.parametrize("key", ["values", "group_size"])
def test_a_recipe_from_before_there_were_integers_is_that_of_the_bases_precision(base, tmp_path, key):
    """Finished or interrupted."""
    partial = interrupt(base, tmp_path / "out")
    forget(partial / STATE, key)
    derive_tiny(base, tmp_path / "out", resume=True)
    forget(tmp_path / "out" / MANIFEST, key)
    assert derive_tiny(base, tmp_path / "out", resume=True).log == {}
    with pytest.raises(OutputError, match=r"made with another recipe \(values\)"):
        derive_tiny(base, tmp_path / "out", resume=True, values="int8")


def forget(path, key):
    content = json.loads(path.read_text())
    del content["recipe"][key]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_code(base, tmp_path, threads):
    """Of a method that looks at no data: sums over calibration tokens may differ in their last bits."""
    derive_tiny(base, tmp_path / "one", values="int4", method="magnitude")
    derive_tiny(base, tmp_path / "more", values="int4", method="magnitude", threads=threads)
    assert contents(tmp_path / "one") == contents(tmp_path / "more")


def test_quality(derived):
    """int8 gives nearly the logits of the base's precision (some masks differ in later blocks), int4 worse ones."""
    token_ids = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (4, 64)))

    def logits(folder):
        with torch.inference_mode():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(token_ids).logits.log_softmax(-1)

    wanted = logits(derived["base"])
    divergence = {
        values: float((wanted.exp() * (wanted - logits(derived[values]))).sum(-1).mean()) for values in ("int8", "int4")
    }
    assert 0 < divergence["int8"] < 0.02
    assert 5 * divergence["int8"] < divergence["int4"] < 0.5


def test_the_statistics_of_inputs_make_int4_better(base):
    """The error of each block's outputs, where some inputs are far louder than others."""
    loud = load_file(base / "model.safetensors")
    statistics = torch.exp(2 * torch.randn(160, generator=torch.Generator().manual_seed(0)))
    weight = loud["model.layers.1.mlp.down_proj.weight"]
    how = {"values": "int4", "group_size": 32}
    inputs = torch.randn(1000, 160, generator=torch.Generator().manual_seed(1)) * statistics.sqrt()
    errors = [
        float(((weight - dequantise(quantise(weight, None, one, **how), **how)) @ inputs.T).norm())
        for one in (inputs.square().sum(0), None)
    ]
    assert errors[0] < 0.9 * errors[1]
