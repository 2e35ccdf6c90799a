"""Reordered rows of a trimmed head: the order itself, files made by hand, and what is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.checkpoint.format import (
    DENSE_ENCODING,
    Encoding,
    Stored,
    StoredWeights,
    TrimmedHead,
    check_quantization_config,
    quantization_config,
)
from secateur.checkpoint.quantise import dequantise, quantise
from secateur.checkpoint.shards import read_shard, write_outer_shard
from secateur.checkpoint.shortlist import Shortlist, checked_shortlist
from secateur.errors import CheckpointError

HEAD, OTHER = "lm_head.weight", "model.embed_tokens.weight"
BLOCK = StoredWeights(Encoding("bf16"), {"a.weight": (2, 5)})
TOKENS = Shortlist(np.array([1, 3, 4], dtype=np.int32), 6)
ENCODINGS = {"int8": DENSE_ENCODING, "bf16": Encoding("bf16")}


def test_the_shortlist_comes_first_and_the_others_follow():
    assert TOKENS.order().tolist() == [1, 3, 4, 0, 2, 5]
    assert TOKENS.rows().tolist() == [3, 0, 4, 1, 2, 5]
    assert TOKENS.order()[TOKENS.rows()].tolist() == list(range(6))
    logits = TOKENS.spread(np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32))
    none = -np.inf
    assert logits.tolist() == [[none, 1, none, 2, 3, none], [none, 4, none, 5, 6, none]]
    everything = Shortlist(np.arange(6, dtype=np.int32), 6)
    assert everything.order().tolist() == list(range(6))


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (np.array([1, 3, 4], dtype=np.int64), "is int64"),
        (np.array([1, 3], dtype=np.int32), r"expected int32 \[3\]"),
        (np.array([[1, 3, 4]], dtype=np.int32), r"expected int32 \[3\]"),
        (np.array([1, 3, 6], dtype=np.int32), "outside of the vocabulary of 6"),
        (np.array([-1, 3, 4], dtype=np.int32), "outside of the vocabulary of 6"),
        (np.array([1, 3, 3], dtype=np.int32), "ascending"),
        (np.array([3, 1, 4], dtype=np.int32), "ascending"),
        (np.array([2**31 - 1, -(2**31), 0], dtype=np.int32), "outside"),
    ],
)
def test_what_is_no_shortlist_is_refused(tokens, problem):
    with pytest.raises(CheckpointError, match=f"shortlist of '{HEAD}' .*{problem}"):
        checked_shortlist(tokens, 3, 6, HEAD)


def stored(values: str) -> Stored:
    shapes = {HEAD: (6, 64), OTHER: (6, 64)} if values == "int8" else {HEAD: (6, 64)}
    return Stored(BLOCK, StoredWeights(ENCODINGS[values], shapes), shortlist=TrimmedHead(HEAD, 3))


def outer_shard(path, values):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(6, 64, generator=generator).bfloat16() for name in (HEAD, OTHER)}
    shapes = {name: (tuple(one.shape), one.dtype) for name, one in weights.items()}
    write_outer_shard(path, shapes, weights.__getitem__, stored(values), TOKENS)
    return weights


@pytest.mark.parametrize("values", ENCODINGS)
def test_a_reader_restores_the_order_of_the_base(tmp_path, values):
    weights = outer_shard(tmp_path / "outer.safetensors", values)
    found = read_shard(tmp_path / "outer.safetensors", stored(values))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        wanted = weight
        if values == "int8":
            wanted = dequantise(
                quantise(weight, None, None, values="int8", group_size=128), values="int8", group_size=128
            )
        assert torch.equal(found[name], wanted)
    parts = load_file(tmp_path / "outer.safetensors")
    assert parts[f"{HEAD}.shortlist"].tolist() == [1, 3, 4]
    if values == "bf16":
        assert parts.keys() == {f"{HEAD}.values", f"{HEAD}.shortlist", OTHER}
        assert torch.equal(parts[f"{HEAD}.values"], weights[HEAD][[1, 3, 4, 0, 2, 5]])


@pytest.mark.parametrize("values", ENCODINGS)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda parts: parts.pop(f"{HEAD}.shortlist"), "lacks 'lm_head.weight.shortlist'"),
        (lambda parts: parts.update({f"{OTHER}.shortlist": torch.ones(3).int()}), "does not tell of"),
        (lambda parts: parts[f"{HEAD}.shortlist"].copy_(torch.tensor([1, 3, 3])), "ascending"),
        (lambda parts: parts.update({f"{HEAD}.values": parts[f"{HEAD}.values"][:5].clone()}), "is damaged"),
        (lambda parts: parts.update({f"{HEAD}.values": parts[f"{HEAD}.values"].int()}), "is damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, values, change, problem):
    outer_shard(tmp_path / "outer.safetensors", values)
    parts = load_file(tmp_path / "outer.safetensors")
    change(parts)
    save_file(parts, tmp_path / "changed.safetensors")
    with pytest.raises(CheckpointError, match=problem):
        read_shard(tmp_path / "changed.safetensors", stored(values))


def test_floats_that_are_not_finite_are_refused(tmp_path):
    outer_shard(tmp_path / "outer.safetensors", "bf16")
    parts = load_file(tmp_path / "outer.safetensors")
    parts[f"{HEAD}.values"][2, 3] = float("inf")
    save_file(parts, tmp_path / "changed.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        read_shard(tmp_path / "changed.safetensors", stored("bf16"))


def test_the_config_says_the_lowest_version_that_describes_it():
    plain = Stored(BLOCK)
    assert quantization_config(plain)["version"] == 1
    assert check_quantization_config(quantization_config(plain)) == plain
    integers = StoredWeights(Encoding("int4", 64), {"a.weight": (2, 5), "b.weight": (2, 5)})
    for one in (stored("int8"), stored("bf16"), Stored(integers, unmasked=frozenset({"b.weight"}))):
        said = quantization_config(one)
        assert said["version"] == 2
        assert check_quantization_config(said) == one
        assert not {"unmasked", "shortlist"} <= said.keys()
    assert said["unmasked"] == ["b.weight"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"version": 1, "shortlist": None},
        {"shortlist": 3},
        {"shortlist": {"weight": HEAD}},
        {"shortlist": {"weight": "a.weight", "tokens": 2}},
        {"shortlist": {"weight": [HEAD], "tokens": 3}},
        {"shortlist": {"weight": HEAD, "tokens": 0}},
        {"shortlist": {"weight": HEAD, "tokens": 7}},
        {"shortlist": {"weight": HEAD, "tokens": True}},
        {"shortlist": {"weight": HEAD, "tokens": 3.0}},
        {"unmasked": "a.weight"},
        {"unmasked": ["b.weight"]},
        {"unmasked": [["a.weight"]]},
        {"unmasked": ["a.weight"]},  # whose values are floats
        {"dense": {"values": "fp8", "shapes": {HEAD: [6, 64]}}},
        {"dense": {"values": "bf16", "group_size": 64, "shapes": {HEAD: [6, 64]}}},
    ],
)
def test_a_config_that_cannot_be_is_refused(change):
    with pytest.raises(CheckpointError, match="this version of secateur reads"):
        check_quantization_config({**quantization_config(stored("bf16")), **change})
