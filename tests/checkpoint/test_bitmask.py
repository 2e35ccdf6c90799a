import dataclasses
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from secateur.checkpoint.bitmask import PackedWeight, check, pack, unpack
from secateur.checkpoint.format import FLOATS, Stored, StoredWeights
from secateur.checkpoint.shards import read_shard, write_block_shard
from secateur.errors import CheckpointError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
NAME = "model.layers.0.mlp.up_proj.weight"


def floats(shapes):
    return Stored(StoredWeights(FLOATS, shapes))


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(BITS[left.dtype]), right.view(BITS[right.dtype]))


def random_weight(shape, dtype=torch.float32, seed=0, kept=0.5):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[torch.rand(shape, generator=generator) < 0.1] = -0.0  # kept weights may be zero
    return weight, torch.rand(shape, generator=generator) < kept


def assert_round_trip(weight, mask):
    packed = pack(weight, mask)
    out_features, in_features = weight.shape
    assert packed.bitmask.shape == (out_features, -(-in_features // 64) * 8)
    assert packed.values.numel() * packed.values.element_size() % 64 == 0
    found, found_mask = unpack(packed, (out_features, in_features))
    assert torch.equal(found_mask, mask)
    assert same_bits(found[mask], weight[mask])
    assert not found[~mask].view(BITS[weight.dtype]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 63, 64, 65, 128, 160])
def test_round_trip(width, dtype):
    weight, mask = random_weight((11, width), dtype, seed=width)
    mask[3] = False
    mask[4] = True
    assert_round_trip(weight, mask)
    assert_round_trip(weight, torch.ones_like(mask))
    assert_round_trip(weight, torch.zeros_like(mask))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20), st.integers(1, 200), st.floats(0, 1), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_round_trip_of_any_shape(rows, width, kept, dtype, seed):
    assert_round_trip(*random_weight((rows, width), dtype, seed, kept))


def test_round_trip_of_transposed_weights():
    weight, mask = random_weight((70, 9))
    assert_round_trip(weight.t(), mask.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_made_by_hand_is_read(tmp_path, dtype):
    """Two rows of 66 columns; row 0 keeps columns 0, 9 and 65, row 1 keeps 63 and 64 (a zero)."""
    code, size, fmt = ("BF16", 2, "<H") if dtype == torch.bfloat16 else ("F32", 4, "<I")
    numbers = [1.0, -2.0, 0.5, 3.0, -0.0]
    raw = b"".join(struct.pack(fmt, struct.unpack("<I", struct.pack("<f", x))[0] >> (32 - 8 * size)) for x in numbers)
    bitmask = bytes([0b00000001, 0b00000010, 0, 0, 0, 0, 0, 0, 0b00000010, 0, 0, 0, 0, 0, 0, 0])
    bitmask += bytes([0, 0, 0, 0, 0, 0, 0, 0b10000000, 0b00000001, 0, 0, 0, 0, 0, 0, 0])
    values = raw + bytes(64 - len(raw))
    offsets = struct.pack("<3q", 0, 3, 5)
    header = (
        f'{{"{NAME}.bitmask":{{"dtype":"U8","shape":[2,16],"data_offsets":[0,32]}},'
        f'"{NAME}.values":{{"dtype":"{code}","shape":[{64 // size}],"data_offsets":[32,96]}},'
        f'"{NAME}.row_offsets":{{"dtype":"I64","shape":[3],"data_offsets":[96,120]}}}}'
    ).encode()
    path = tmp_path / "hand.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bitmask + values + offsets)
    wanted = torch.zeros(2, 66, dtype=dtype)
    wanted[0, 0], wanted[0, 9], wanted[0, 65], wanted[1, 63], wanted[1, 64] = numbers
    assert same_bits(read_shard(path, floats({NAME: (2, 66)}))[NAME], wanted)

    # The other way round: packing gives exactly these bytes.
    mask = torch.zeros(2, 66, dtype=torch.bool)
    mask[0, [0, 9, 65]] = mask[1, [63, 64]] = True
    packed = pack(wanted, mask)
    assert packed.bitmask.numpy().tobytes() == bitmask
    assert packed.values.view(torch.uint8).numpy().tobytes() == values
    assert packed.row_offsets.numpy().tobytes() == offsets


def changed(packed, **changes):
    return dataclasses.replace(packed, **changes)


def poked(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


CORRUPTIONS = {
    "bitmask of another type": lambda p: changed(p, bitmask=p.bitmask.to(torch.int8)),
    "bitmask flat": lambda p: changed(p, bitmask=p.bitmask.reshape(-1)),
    "bitmask too narrow": lambda p: changed(p, bitmask=p.bitmask[:, :-1]),
    "bitmask too wide": lambda p: changed(p, bitmask=torch.cat([p.bitmask, p.bitmask[:, :8] * 0], 1)),
    "bitmask lacks a row": lambda p: changed(p, bitmask=p.bitmask[:-1]),
    "a bit too many": lambda p: changed(p, bitmask=poked(p.bitmask, (2, 0), p.bitmask[2, 0] | ~p.bitmask[2, 0])),
    "a bit too few": lambda p: changed(p, bitmask=poked(p.bitmask, 2, 0)),
    "a bit moved beyond the width": lambda p: changed(
        p, bitmask=poked(poked(p.bitmask, (0, 0), p.bitmask[0, 0] & (p.bitmask[0, 0] - 1)), (0, 8), 2)
    ),
    "a bit moved into the last byte": lambda p: changed(
        p, bitmask=poked(poked(p.bitmask, (0, 0), p.bitmask[0, 0] & (p.bitmask[0, 0] - 1)), (0, 15), 128)
    ),
    "values of another type": lambda p: changed(p, values=p.values.to(torch.float64)),
    "values as integers": lambda p: changed(p, values=p.values.to(torch.int16)),
    "values in two dimensions": lambda p: changed(p, values=p.values.reshape(2, -1)),
    "a value too few": lambda p: changed(p, values=p.values[:-1]),
    "a value too many": lambda p: changed(p, values=torch.cat([p.values, p.values[:1]])),
    "a line of values too few": lambda p: changed(p, values=p.values[:-16]),
    "a line of values too many": lambda p: changed(p, values=torch.cat([p.values, p.values[:16]])),
    "no values": lambda p: changed(p, values=p.values[:0]),
    "NaN": lambda p: changed(p, values=poked(p.values, 3, float("nan"))),
    "infinity": lambda p: changed(p, values=poked(p.values, 3, float("-inf"))),
    "NaN in the padding": lambda p: changed(p, values=poked(p.values, -1, float("nan"))),
    "offsets of another type": lambda p: changed(p, row_offsets=p.row_offsets.to(torch.int32)),
    "an offset too few": lambda p: changed(p, row_offsets=p.row_offsets[:-1]),
    "an offset too many": lambda p: changed(p, row_offsets=torch.cat([p.row_offsets, p.row_offsets[-1:]])),
    "offsets in two dimensions": lambda p: changed(p, row_offsets=p.row_offsets[None]),
    "offsets that do not begin at 0": lambda p: changed(p, row_offsets=p.row_offsets + 1),
    "a negative offset": lambda p: changed(p, row_offsets=poked(p.row_offsets, 1, -1)),
    "an offset out of order": lambda p: changed(p, row_offsets=poked(p.row_offsets, 1, p.row_offsets[3])),
    "a huge offset": lambda p: changed(p, row_offsets=poked(p.row_offsets, -1, 2**62)),
    "the smallest offset": lambda p: changed(p, row_offsets=poked(p.row_offsets, 2, -(2**63))),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption_is_found(corruption):
    weight, mask = random_weight((6, 65))
    mask[0, 0] = True  # the bit that is moved
    mask[0, 64] = False
    packed = pack(weight, mask)
    check(packed, (6, 65), NAME)
    with pytest.raises(CheckpointError, match=f"'{NAME}' is damaged"):
        unpack(CORRUPTIONS[corruption](packed), (6, 65), NAME)


@pytest.mark.parametrize("shape", [(6, 64), (6, 66), (5, 65), (7, 65), (6, 129)])
def test_a_foreign_shape_is_found(shape):
    weight, mask = random_weight((6, 65))
    mask[:, 64] = True
    packed = pack(weight, mask)
    if shape == (6, 66):  # nothing in the parts tells 65 columns from 66: the shape comes from the config
        assert unpack(packed, shape)[1][:, 65].sum() == 0
        return
    with pytest.raises(CheckpointError, match="is damaged"):
        unpack(packed, shape, NAME)


@pytest.mark.parametrize("width", [576, 1536])
def test_what_is_mapped_is_aligned(tmp_path, width):
    packed = {f"{i}.weight": pack(*random_weight((192, width), torch.bfloat16, seed=i)) for i in range(3)}
    path = tmp_path / "shard.safetensors"
    write_block_shard(path, packed, {"norm.weight": torch.ones(31, dtype=torch.bfloat16), "bias": torch.ones(3)})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    mapped = {name: entry for name, entry in header.items() if name.endswith((".values", ".bitmask"))}
    assert len(mapped) == 6
    for name, entry in mapped.items():
        assert (8 + length + entry["data_offsets"][0]) % 64 == 0, name
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("1.weight.values"), packed["1.weight"].values)


def test_a_shard_that_lacks_a_part_or_names_an_unknown_weight(tmp_path):
    from safetensors.torch import save_file

    packed = pack(*random_weight((6, 65)))
    for part in ("bitmask", "values", "row_offsets"):
        tensors = packed.tensors(NAME)
        del tensors[f"{NAME}.{part}"]
        save_file(tensors, tmp_path / "lacking.safetensors")
        with pytest.raises(CheckpointError, match=f"lacks '{NAME}.{part}'"):
            read_shard(tmp_path / "lacking.safetensors", floats({NAME: (6, 65)}))
    save_file(packed.tensors(NAME), tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match=NAME):
        read_shard(tmp_path / "whole.safetensors", floats({}))


def test_no_rows():
    packed = PackedWeight(
        torch.zeros(0, 16, dtype=torch.uint8), torch.zeros(0), torch.from_numpy(np.zeros(1, dtype=np.int64))
    )
    assert unpack(packed, (0, 65))[0].shape == (0, 65)
