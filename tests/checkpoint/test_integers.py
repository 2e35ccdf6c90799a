"""Weights as integers on disk: round trips, files made by hand byte for byte, and every way to be damaged."""

import dataclasses
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from secateur.checkpoint.bitmask import check, pack_integers, unpack
from secateur.checkpoint.dense import DenseWeight, unpack_dense
from secateur.checkpoint.format import DENSE_ENCODING, FLOATS, Encoding, Stored, StoredWeights
from secateur.checkpoint.quantise import Quantised, dequantise, n_groups, quantise
from secateur.checkpoint.shards import read_shard, write_block_shard, write_outer_shard
from secateur.errors import CheckpointError

NAME = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
INT4, INT8 = Encoding("int4", 32), Encoding("int8", 64)


def random_codes(shape, encoding, seed=0, kept=0.5):
    """Return (quantised, mask) of random codes and scales, both signs."""
    generator = torch.Generator().manual_seed(seed)
    low = 1 if encoding.bits == 8 else 0
    codes = torch.randint(low, 1 << encoding.bits, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randn(shape[0], n_groups(shape[1], encoding.group_size), generator=generator).bfloat16()
    return Quantised(codes, scales), torch.rand(shape, generator=generator) < kept


def assert_round_trip(quantised, mask, encoding):
    shape = tuple(mask.shape)
    packed = pack_integers(quantised, mask, encoding.bits)
    counts = mask.sum(1)
    lengths = (counts + 1) // 2 if encoding.bits == 4 else counts
    assert torch.equal(packed.row_offsets.diff(), lengths)
    assert packed.values.numel() == -(-int(lengths.sum()) // 64) * 64
    assert not packed.values[int(lengths.sum()) :].any()
    found, found_mask = unpack(packed, shape, NAME, encoding)
    assert torch.equal(found_mask, mask)
    assert found.dtype == torch.float32
    dense = dequantise(quantised, values=encoding.values, group_size=encoding.group_size)
    assert torch.equal(found, torch.where(mask, dense, 0.0))
    assert not torch.signbit(found[found == 0]).any()
    assert torch.equal(unpack(packed, shape, NAME, encoding, torch.bfloat16)[0], found.bfloat16())


@pytest.mark.parametrize("encoding", [INT4, INT8, Encoding("int4", 128), Encoding("nl4", 64)])
@pytest.mark.parametrize("width", [1, 7, 31, 63, 64, 65, 160])
def test_round_trip(width, encoding):
    quantised, mask = random_codes((11, width), encoding, width)
    mask[3] = False
    mask[4] = True
    assert_round_trip(quantised, mask, encoding)
    assert_round_trip(quantised, torch.ones_like(mask), encoding)
    assert_round_trip(quantised, torch.zeros_like(mask), encoding)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 200), st.floats(0, 1), st.sampled_from([INT4, INT8]), st.integers(0, 2**31))
def test_round_trip_of_any_shape(rows, width, kept, encoding, seed):
    assert_round_trip(*random_codes((rows, width), encoding, seed, kept), encoding)


def write_by_hand(path, tensors):
    """Write a safetensors file from (name, dtype, shape, bytes)."""
    header, data = [], b""
    for name, dtype, shape, content in tensors:
        ends = f"[{len(data)},{len(data) + len(content)}]"
        header.append(f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{ends}}}')
        data += content
    text = ("{" + ",".join(header) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_an_int4_file_made_by_hand_is_read(tmp_path):
    """Two rows of 66 columns; row 0 keeps columns 0, 9 and 65 (an odd number), row 1 keeps 63 and 64."""
    bitmask = bytes([0b00000001, 0b00000010, 0, 0, 0, 0, 0, 0, 0b00000010, 0, 0, 0, 0, 0, 0, 0])
    bitmask += bytes([0, 0, 0, 0, 0, 0, 0, 0b10000000, 0b00000001, 0, 0, 0, 0, 0, 0, 0])
    # Codes 7, -8, 3 of row 0 and 0, -1 of row 1, with 8 added.
    values = bytes([0x0F, 0x0B, 0x78]) + bytes(61)
    offsets = struct.pack("<3q", 0, 2, 3)
    # 1.0, 0.0, -0.5 | 0.0, 3.0, 0.25 in bfloat16: the upper half of a float32.
    scales = bytes.fromhex("803f 0000 00bf 0000 4040 803e")
    tensors = [
        (f"{NAME}.bitmask", "U8", "[2,16]", bitmask),
        (f"{NAME}.values", "U8", "[64]", values),
        (f"{NAME}.row_offsets", "I64", "[3]", offsets),
        (f"{NAME}.scales", "BF16", "[2,3]", scales),
    ]
    write_by_hand(tmp_path / "hand.safetensors", tensors)
    wanted = torch.zeros(2, 66)
    wanted[0, 0], wanted[0, 9], wanted[0, 65] = 7 * 1.0, -8 * 1.0, 3 * -0.5
    wanted[1, 63], wanted[1, 64] = 0 * 3.0, -1 * 0.25
    stored = Stored(StoredWeights(INT4, {NAME: (2, 66)}))
    found = read_shard(tmp_path / "hand.safetensors", stored)[NAME]
    assert torch.equal(found, wanted)

    # The other way round: packing gives exactly these bytes.
    mask = torch.zeros(2, 66, dtype=torch.bool)
    mask[0, [0, 9, 65]] = mask[1, [63, 64]] = True
    codes = torch.full((2, 66), 8, dtype=torch.uint8)
    codes[0, [0, 9, 65]] = torch.tensor([15, 0, 11], dtype=torch.uint8)
    codes[1, [63, 64]] = torch.tensor([8, 7], dtype=torch.uint8)
    packed = pack_integers(
        Quantised(codes, torch.tensor([[1.0, 0, -0.5], [0, 3, 0.25]], dtype=torch.bfloat16)), mask, 4
    )
    assert packed.bitmask.numpy().tobytes() == bitmask
    assert packed.values.numpy().tobytes() == values
    assert packed.row_offsets.numpy().tobytes() == offsets
    assert packed.scales.view(torch.int16).numpy().tobytes() == scales


def test_int8_files_made_by_hand_are_read(tmp_path):
    """A pruned weight [2, 5] and a dense one [2, 3]."""
    tensors = [
        (f"{NAME}.bitmask", "U8", "[2,8]", bytes([0b01101, 0, 0, 0, 0, 0, 0, 0, 0b10100, 0, 0, 0, 0, 0, 0, 0])),
        (f"{NAME}.values", "U8", "[64]", bytes([255, 128, 1, 130, 100]) + bytes(59)),
        (f"{NAME}.row_offsets", "I64", "[3]", struct.pack("<3q", 0, 3, 5)),
        (f"{NAME}.scales", "BF16", "[2,1]", bytes.fromhex("803f 0040")),
        (f"{EMBEDDING}.values", "U8", "[2,3]", bytes([1, 128, 255, 129, 127, 64])),
        (f"{EMBEDDING}.scales", "BF16", "[2,1]", bytes.fromhex("003f 803f")),
        ("model.norm.weight", "BF16", "[1]", bytes.fromhex("803f")),
    ]
    write_by_hand(tmp_path / "hand.safetensors", tensors)
    stored = Stored(StoredWeights(INT8, {NAME: (2, 5)}), StoredWeights(DENSE_ENCODING, {EMBEDDING: (2, 3)}))
    found = read_shard(tmp_path / "hand.safetensors", stored)
    assert found.keys() == {NAME, EMBEDDING, "model.norm.weight"}
    assert found[NAME].tolist() == [[127, 0, 0, -127, 0], [0, 0, 4, 0, -56]]
    assert found[EMBEDDING].tolist() == [[-63.5, 0, 63.5], [1, -1, -64]]
    assert found["model.norm.weight"].dtype == torch.bfloat16
    rounded = read_shard(tmp_path / "hand.safetensors", stored, torch.bfloat16)
    assert rounded[EMBEDDING].dtype == torch.bfloat16


def changed(packed, **changes):
    return dataclasses.replace(packed, **changes)


def poked(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


# Row 0 of the weight that is damaged keeps an odd number of entries.
CORRUPTIONS = {
    "a bit too many": lambda p: changed(p, bitmask=poked(p.bitmask, (2, 0), p.bitmask[2, 0] | ~p.bitmask[2, 0])),
    "a bit moved beyond the width": lambda p: changed(
        p, bitmask=poked(poked(p.bitmask, (0, 0), p.bitmask[0, 0] & (p.bitmask[0, 0] - 1)), (0, 8), 2)
    ),
    "values of another type": lambda p: changed(p, values=p.values.view(torch.int8)),
    "values as floats": lambda p: changed(p, values=p.values.float()),
    "values in two dimensions": lambda p: changed(p, values=p.values.reshape(2, -1)),
    "a line of values too few": lambda p: changed(p, values=p.values[:-64]),
    "a line of values too many": lambda p: changed(p, values=torch.cat([p.values, p.values[:64]])),
    "offsets that count otherwise": lambda p: changed(p, row_offsets=2 * p.row_offsets),
    "an offset out of order": lambda p: changed(p, row_offsets=poked(p.row_offsets, 1, p.row_offsets[3])),
    "a huge offset": lambda p: changed(p, row_offsets=poked(p.row_offsets, -1, 2**62)),
    "no scales": lambda p: changed(p, scales=None),
    "scales of another type": lambda p: changed(p, scales=p.scales.half()),
    "scales flat": lambda p: changed(p, scales=p.scales.reshape(-1)),
    "a scale too few": lambda p: changed(p, scales=p.scales[:, :-1]),
    "scales of a row too few": lambda p: changed(p, scales=p.scales[:-1]),
    "scales of another group size": lambda p: changed(p, scales=torch.cat([p.scales, p.scales], 1)),
    "a scale that is NaN": lambda p: changed(p, scales=poked(p.scales, (1, 0), float("nan"))),
    "a scale that is infinite": lambda p: changed(p, scales=poked(p.scales, (-1, -1), float("-inf"))),
}
OWN = {
    "int4": {
        "the unused half of a byte": lambda p: changed(p, values=poked(p.values, int(p.row_offsets[1]) - 1, 0xFF))
    },
    "int8": {"the code -128": lambda p: changed(p, values=poked(p.values, 3, 0))},
}


@pytest.mark.parametrize(
    ("encoding", "corruption"),
    [(encoding, name) for encoding in (INT4, INT8) for name in (*CORRUPTIONS, *OWN[encoding.values])],
    ids=lambda value: value if isinstance(value, str) else value.values,
)
def test_every_corruption_is_found(encoding, corruption):
    quantised, mask = random_codes((6, 65), encoding)
    mask[0] = False
    mask[0, :33] = True
    packed = pack_integers(quantised, mask, encoding.bits)
    check(packed, (6, 65), NAME, encoding)
    unpack(packed, (6, 65), NAME, encoding)
    damage = (CORRUPTIONS | OWN[encoding.values])[corruption]
    with pytest.raises(CheckpointError, match=f"'{NAME}' is damaged"):
        unpack(damage(packed), (6, 65), NAME, encoding)


def test_an_encoding_and_its_tensors_must_agree():
    quantised, mask = random_codes((6, 65), INT4)
    packed = pack_integers(quantised, mask, 4)
    for other in (FLOATS, INT8, Encoding("int4", 64)):
        with pytest.raises(CheckpointError, match="is damaged"):
            unpack(packed, (6, 65), NAME, other)
    floats = changed(
        packed,
        values=torch.zeros(256),
        row_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]),
    )
    with pytest.raises(CheckpointError, match=r"is damaged: (there are scales beside floats|\d+ values)"):
        unpack(floats, (6, 65), NAME, FLOATS)


DENSE_CORRUPTIONS = {
    "values of another type": lambda q: changed(q, values=q.values.view(torch.int8)),
    "values of another shape": lambda q: changed(q, values=q.values.T.contiguous()),
    "values flat": lambda q: changed(q, values=q.values.reshape(-1)),
    "the code -128": lambda q: changed(q, values=poked(q.values, (4, 4), 0)),
    "no scales": lambda q: changed(q, scales=None),
    "scales of another shape": lambda q: changed(q, scales=q.scales[:, :1]),
    "scales of another type": lambda q: changed(q, scales=q.scales.float()),
    "a scale that is NaN": lambda q: changed(q, scales=poked(q.scales, (0, 1), float("nan"))),
}


@pytest.mark.parametrize("corruption", DENSE_CORRUPTIONS)
def test_every_corruption_of_a_dense_matrix_is_found(corruption):
    quantised, _ = random_codes((6, 130), DENSE_ENCODING)
    stored = DenseWeight(quantised.codes, quantised.scales)
    unpack_dense(stored, (6, 130), EMBEDDING, DENSE_ENCODING)
    with pytest.raises(CheckpointError, match=f"'{EMBEDDING}' is damaged"):
        unpack_dense(DENSE_CORRUPTIONS[corruption](stored), (6, 130), EMBEDDING, DENSE_ENCODING)


def test_a_shard_that_lacks_a_part_or_has_one_too_many(tmp_path):
    quantised, mask = random_codes((6, 65), INT4)
    parts = pack_integers(quantised, mask, 4).tensors(NAME)
    assert len(parts) == 4
    stored = Stored(StoredWeights(INT4, {NAME: (6, 65)}), StoredWeights(DENSE_ENCODING, {EMBEDDING: (6, 65)}))
    dense = {f"{EMBEDDING}.values": quantised.codes + 16, f"{EMBEDDING}.scales": quantised.scales[:, :1].contiguous()}
    path = tmp_path / "shard.safetensors"
    save_file(parts | dense, path)
    assert read_shard(path, stored).keys() == {NAME, EMBEDDING}
    for lost in (*parts, *dense):
        save_file({name: tensor for name, tensor in (parts | dense).items() if name != lost}, path)
        with pytest.raises(CheckpointError, match=f"lacks '{lost}'"):
            read_shard(path, stored)
    save_file(parts, path)
    with pytest.raises(CheckpointError, match=f"does not tell of, '{NAME}"):
        read_shard(path, Stored(StoredWeights(INT4, {"other.weight": (6, 65)})))
    save_file(dense | {f"{EMBEDDING}.bitmask": torch.zeros(6, 16, dtype=torch.uint8)}, path)
    with pytest.raises(CheckpointError, match=f"does not tell of, '{EMBEDDING}.bitmask"):
        read_shard(path, stored)


def test_what_is_mapped_is_aligned_and_the_outer_shard_is_made_in_turn(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(130, 96, generator=generator).bfloat16() for name in (EMBEDDING, "lm_head.weight")}
    weights["norm"] = torch.ones(96, dtype=torch.bfloat16)
    loaded = []

    def load(name):
        loaded.append(name)
        return weights[name]

    dense = StoredWeights(DENSE_ENCODING, dict.fromkeys((EMBEDDING, "lm_head.weight"), (130, 96)))
    path = tmp_path / "outer.safetensors"
    stored = Stored(StoredWeights(INT4), dense)
    write_outer_shard(path, {name: (tuple(one.shape), one.dtype) for name, one in weights.items()}, load, stored)
    assert sorted(loaded) == sorted(weights), "each is read once, though it makes two tensors"
    found = read_shard(path, stored)
    assert found.keys() == weights.keys()
    for name in dense.shapes:
        quantised = quantise(weights[name], None, None, values="int8", group_size=128)
        assert torch.equal(found[name], dequantise(quantised, values="int8", group_size=128))
        assert float((found[name] - weights[name].float()).abs().max()) < 0.03
    assert torch.equal(found["norm"], weights["norm"])

    quantised, mask = random_codes((192, 576), INT4)
    write_block_shard(tmp_path / "block.safetensors", {NAME: pack_integers(quantised, mask, 4)}, {})
    raw = (tmp_path / "block.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for suffix in ("bitmask", "values", "scales"):
        assert (8 + length + header[f"{NAME}.{suffix}"]["data_offsets"][0]) % 64 == 0
