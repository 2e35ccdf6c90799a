"""Packed matrices: torch's way to unpack them against the codec, the kernels' products against both."""

import copy

import pytest
import torch

from secateur.checkpoint import bitmask
from secateur.checkpoint.dense import DenseWeight, pack_dense, unpack_dense
from secateur.checkpoint.format import Encoding
from secateur.checkpoint.quantise import quantise
from secateur.errors import CheckpointError
from secateur.runtime import kernels, packed_matrix
from secateur.runtime.packed_matrix import PackedMatrix

SHAPES = [(7, 5), (6, 64), (9, 160), (130, 200)]
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VALUES = [*FLOATS, "int8", "int4", "nl4"]


def stored(values, shape, seed=0):
    """Return the parts of a random pruned weight, with an empty row and a full one, and its encoding."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[1], mask[-1] = False, True
    if values in FLOATS:
        encoding, packed = Encoding(values), bitmask.pack(weight.to(FLOATS[values]), mask)
    else:
        encoding = Encoding(values, 32)
        quantised = quantise(weight, mask, None, values=encoding.values, group_size=32)
        packed = bitmask.pack_integers(quantised, mask, encoding.bits)
    return {name.removeprefix("."): part for name, part in packed.tensors("").items()}, encoding


def matrix(values, shape, dtype=torch.float32, changes=None):
    parts, encoding = stored(values, shape)
    return PackedMatrix({**parts, **(changes or {})}, shape, encoding, dtype, "w")


def dense(shape=(40, 96), dtype=torch.float32, values="int8", rows=None):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if values in FLOATS:
        encoding, packed = Encoding(values), DenseWeight(weight.to(FLOATS[values]))
    else:
        encoding = Encoding(values, 32)
        packed = pack_dense(quantise(weight, None, None, values=encoding.values, group_size=32), encoding)
    parts = {name.removeprefix("."): part for name, part in packed.tensors("").items()}
    found = PackedMatrix(parts, shape, encoding, dtype, "w", rows=rows)
    return found, unpack_dense(packed, shape, "w", encoding, rows=rows).float()


def reference(values, shape):
    parts, encoding = stored(values, shape)
    return bitmask.unpack(bitmask.PackedWeight(**parts), shape, "w", encoding)[0]


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)


@pytest.mark.parametrize("block", [1, 300, 1 << 24])
@pytest.mark.parametrize("values", VALUES)
def test_torch_unpacks_what_the_codec_does(monkeypatch, values, block):
    monkeypatch.setattr(packed_matrix, "BLOCK_ENTRIES", block)
    for shape in SHAPES:
        assert torch.equal(matrix(values, shape).unpack(), reference(values, shape).float())
        found = matrix(values, shape, torch.bfloat16).unpack()
        assert torch.equal(found, reference(values, shape).to(torch.bfloat16))


@pytest.mark.parametrize("order", [None, torch.arange(39, -1, -1)], ids=["in place", "reordered"])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("block", [500, 1 << 24])
def test_dense_matrices_and_their_rows(monkeypatch, block, values, order):
    monkeypatch.setattr(packed_matrix, "BLOCK_ENTRIES", block)
    found, expected = dense(values=values, rows=order)
    assert torch.equal(found.unpack(), expected)
    rows = torch.tensor([3, 0, 39, 3])
    assert torch.equal(found.look_up(rows), expected[rows])
    assert dense(dtype=torch.bfloat16)[0].look_up(rows).dtype == torch.bfloat16
    for row in (40, -1):
        with pytest.raises(IndexError):
            found.look_up(torch.tensor([row]))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_through_torch(without_native, monkeypatch, values, dtype):
    monkeypatch.setattr(packed_matrix, "BLOCK_ENTRIES", 2000)
    for shape in SHAPES:
        x, bias = torch.randn(3, shape[1], dtype=dtype), torch.randn(shape[0])
        expected = torch.nn.functional.linear(x, reference(values, shape).to(dtype), bias.to(dtype))
        torch.testing.assert_close(matrix(values, shape).multiply(x, bias), expected)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("values", VALUES)
def test_products_of_dense_matrices_whose_rows_are_reordered(monkeypatch, values, native):
    if not native:
        monkeypatch.setattr(kernels, "available", lambda: False)
    found, expected = dense(
        (40, 95), values=values, rows=torch.randperm(40, generator=torch.Generator().manual_seed(2))
    )
    x, bias = torch.randn(3, 95), torch.randn(40)
    if native and values == "bf16":
        x = x.bfloat16().float()  # as the kernel meets it
    rounding = 0.02 * x.abs().amax() * expected.abs().sum(1) if native and values in {"int8", "int4", "nl4"} else 0
    close = (found.multiply(x, bias) - torch.nn.functional.linear(x, expected, bias)).abs() <= rounding + 1e-4
    assert close.all()


@pytest.mark.parametrize("values", ["bf16", "fp16", "int8", "int4", "nl4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_through_the_kernels(values, dtype):
    for n in (1, 3, 20):
        for shape in SHAPES:
            x, bias = torch.randn(n, shape[1]).to(dtype), torch.randn(shape[0])
            weight = reference(values, shape).float()
            met = x.bfloat16() if values == "bf16" else x  # by the weight
            expected = torch.nn.functional.linear(met.float(), weight, bias)
            found = matrix(values, shape).multiply(x, bias)
            assert found.dtype == dtype
            # Integer kernels round an activation by at most half of 1 / 127 of the largest of its 64 columns.
            rounding = weight.abs().sum(1) * x.float().abs().max() / 254 if values in {"int8", "int4", "nl4"} else 0
            atol = rounding + 1e-4 + expected.abs() * 2 * torch.finfo(dtype).eps
            assert ((found.float() - expected).abs() <= atol).all()


def test_the_kernels_are_used_on_the_cpu(monkeypatch):
    calls = []
    multiply = kernels.matmul
    monkeypatch.setattr(kernels, "matmul", lambda *arguments: calls.append(arguments) or multiply(*arguments))
    x = torch.randn(2, 96)
    for values in VALUES:
        matrix(values, (6, 96)).multiply(x)
    assert [weight.kind for weight, *_ in calls] == ["bf16", "fp16", "int8", "int4", "nl4"]  # not float32
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            dense()[0].multiply(x)
    finally:
        torch.set_num_threads(before)
    pools = [pool for _, _, pool in calls[-3:]]
    assert pools[0] is None
    assert pools[1].threads == 2
    assert pools[1] is pools[2]


@pytest.mark.parametrize("values", VALUES)
def test_another_device_takes_all_of_it_along(values):
    """No tensor of the computation stays on the CPU: torch refuses to mix devices, also with `meta`."""
    moved = matrix(values, (130, 200)).to("meta")
    assert moved.multiply(torch.empty(3, 200, device="meta"), torch.empty(130, device="meta")).shape == (3, 130)
    assert moved.unpack().device.type == "meta"
    assert dense()[0].to("meta").look_up(torch.empty(5, dtype=torch.long, device="meta")).shape == (5, 96)


@pytest.mark.parametrize("values", VALUES)
def test_precision_changes_and_the_stored_numbers_do_not(values):
    parts, encoding = stored(values, (130, 200))
    found = PackedMatrix(parts, (130, 200), encoding, torch.float32, "w")
    places = {name: buffer.data_ptr() for name, buffer in found.named_buffers()}
    assert places == {name: part.data_ptr() for name, part in parts.items()}  # nothing was copied
    x = torch.randn(2, 200)
    before = found.multiply(x)
    found.half().to(torch.bfloat16)
    assert places == {name: buffer.data_ptr() for name, buffer in found.named_buffers()}
    assert found.unpack().dtype == torch.bfloat16
    assert torch.equal(found.multiply(x), before)


def test_copies_stand_alone_and_other_numbers_are_checked():
    first = matrix("bf16", (130, 200))
    x = torch.randn(2, 200)
    expected = first.multiply(x)
    copied = copy.deepcopy(first)
    state = {name: part.clone() for name, part in first.state_dict().items()}
    first.load_state_dict({**state, "values": state["values"] ^ -(1 << 15)})  # other signs
    assert torch.equal(first.multiply(x), -expected)
    assert torch.equal(copied.multiply(x), expected)
    copied._apply(torch.clone)
    copied.values.zero_()  # where the buffers lie now
    assert not copied.multiply(x).any()
    with pytest.raises(CheckpointError, match="row_offsets do not"):
        first.load_state_dict({**state, "row_offsets": state["row_offsets"] + 1})


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4", "nl4"])
def test_damaged_parts_are_refused(monkeypatch, values, native):
    if not native:
        monkeypatch.setattr(kernels, "available", lambda: False)
    parts, _ = stored(values, (9, 160))
    changes = {
        "bitmask": parts["bitmask"] ^ 1,
        "row_offsets": parts["row_offsets"] + 1,
        "values": parts["values"][:64],
    }
    changes |= {"scales": parts["scales"] * torch.inf} if "scales" in parts else {}
    for name, changed in changes.items():
        with pytest.raises(CheckpointError, match="packed weight 'w' is damaged"):
            matrix(values, (9, 160), changes={name: changed})
        with pytest.raises(CheckpointError, match=f"packed weight 'w' is damaged: its {name} are torch.complex64"):
            matrix(values, (9, 160), changes={name: changed.to(torch.complex64)})
    codes = torch.full((4, 64), 128, dtype=torch.uint8)
    for wrong in ({"values": codes[:3]}, {"scales": torch.zeros(3, 2, dtype=torch.bfloat16)}):
        fitting = {"values": codes, "scales": torch.zeros(4, 2, dtype=torch.bfloat16)}
        with pytest.raises(CheckpointError, match="packed weight 'w' is damaged"):
            PackedMatrix({**fitting, **wrong}, (4, 64), Encoding("int8", 32), torch.float32, "w")


def test_parts_that_are_not_aligned_are_copied():
    parts, encoding = stored("bf16", (6, 64))
    raw = torch.zeros(parts["row_offsets"].numel() * 8 + 1, dtype=torch.uint8)
    raw[1:] = parts["row_offsets"].view(torch.uint8)
    shifted = torch.from_numpy(raw.numpy()[1:].view("int64"))
    assert shifted.data_ptr() % 8
    found = PackedMatrix({**parts, "row_offsets": shifted}, (6, 64), encoding, torch.float32, "w")
    assert torch.equal(found.unpack(), reference("bf16", (6, 64)).float())
    assert found.multiply(torch.randn(1, 64)).shape == (1, 6)


def test_a_matrix_that_keeps_nothing():
    for values in VALUES:
        shape, encoding = (3, 64), Encoding(values, 0 if values in FLOATS else 32)
        weight, mask = torch.ones(shape), torch.zeros(shape, dtype=torch.bool)
        if values in FLOATS:
            packed = bitmask.pack(weight.to(FLOATS[values]), mask)
        else:
            quantised = quantise(weight, mask, None, values=encoding.values, group_size=32)
            packed = bitmask.pack_integers(quantised, mask, encoding.bits)
        parts = {name[1:]: part for name, part in packed.tensors("").items()}
        found = PackedMatrix(parts, shape, encoding, torch.float32, "w")
        assert torch.equal(found.multiply(torch.randn(2, 64)), torch.zeros(2, 3))
