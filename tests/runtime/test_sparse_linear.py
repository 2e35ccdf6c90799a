"""The modules that hold packed matrices, in the places of `nn.Linear` and `nn.Embedding`."""

import pytest
import torch
from torch import nn

from secateur.errors import ModelError
from secateur.runtime.sparse_linear import PackedEmbedding, SparseLinear
from tests.runtime.test_packed_matrix import dense, matrix, reference


def linear(values="bf16", shape=(130, 200), bias=True):
    return SparseLinear(matrix(values, shape), torch.randn(shape[0]) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_does_what_linear_does_for_inputs_of_any_form(bias):
    found = linear(bias=bias)
    expected = nn.Linear(200, 130, bias=bias)
    expected.weight.data = reference("bf16", (130, 200)).float()
    if bias:
        expected.bias.data = found.bias.data
    inputs = [torch.randn(*lead, 200) for lead in ((), (1,), (0,), (2, 3), (2, 0, 3), (2, 3, 4))]
    inputs += [torch.randn(200, 6).T, torch.randn(4, 2, 200).transpose(0, 1), torch.randn(5, 1).expand(5, 200)]
    for x in inputs:
        with torch.no_grad():
            torch.testing.assert_close(found(x), expected(x.bfloat16().float()), rtol=1e-5, atol=1e-4)
    assert (found.in_features, found.out_features) == (200, 130)
    assert (found.bias is None) is not bias


def test_a_wrong_width_is_refused():
    for shape in ((3, 100), (2, 400), ()):
        with pytest.raises(ValueError, match=r"expected \[\.\.\., 200\]"):
            linear()(torch.randn(shape))


def test_inference_mode_and_outputs_without_gradient():
    x = torch.randn(2, 200)
    expected = linear(bias=False)(x)  # grad mode, but nothing asks for one
    assert not expected.requires_grad
    with torch.inference_mode():
        assert torch.equal(linear(bias=False)(x), expected)


def test_a_gradient_is_refused_and_not_lost():
    x = torch.randn(2, 200)
    for found, tensor in ((linear(), x.clone().requires_grad_()), (linear().requires_grad_(True), x)):
        with pytest.raises(ModelError, match="'w' has no gradient"):
            found(tensor)
        with torch.no_grad():
            assert found(tensor).shape == (2, 130)
    embedding = PackedEmbedding(dense()[0], nn.Embedding(40, 96)).requires_grad_(True)
    with pytest.raises(ModelError, match="'w' has no gradient"):
        embedding(torch.tensor([1]))


def test_weight_is_a_copy_in_the_models_precision():
    found = linear("int4").to(torch.bfloat16)
    assert torch.equal(found.weight, reference("int4", (130, 200)).to(torch.bfloat16))
    before = found(torch.ones(1, 200))
    found.weight.zero_()
    assert torch.equal(found(torch.ones(1, 200)), before)
    with pytest.raises(AttributeError, match="weight"):
        found.weight = torch.zeros(130, 200)
    assert "in_features=200, out_features=130, bias=True, int4" in repr(found)


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, input_ids):
        return super().forward(input_ids) * self.scale.to(self.weight.dtype)


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_look_up_rows_and_keep_their_own_ways(kind, dtype):
    packed, weight = dense(dtype=dtype)
    expected = kind(40, 96, padding_idx=39, dtype=dtype)
    expected.weight.data = weight.to(dtype)
    found = PackedEmbedding(packed, kind(40, 96, padding_idx=39, dtype=dtype))
    for ids in (torch.tensor([[1, 39, 1], [0, 5, 39]]), torch.tensor(7), torch.empty(2, 0, dtype=torch.long)):
        assert torch.equal(found(ids), expected(ids))
    assert torch.equal(found.weight, expected.weight)
    assert (found.num_embeddings, found.embedding_dim) == (40, 96)
    with pytest.raises(IndexError):
        found(torch.tensor([40]))


def test_embedding_and_head_share_their_matrix_wherever_they_go():
    packed, _ = dense()
    pair = nn.ModuleDict({"embedding": PackedEmbedding(packed, nn.Embedding(40, 96)), "head": SparseLinear(packed)})
    moved = pair.to("meta")
    assert moved["embedding"].packed is moved["head"].packed
    assert len(list(moved.buffers())) == 2


class Interrupted(nn.Embedding):
    """Lets something happen in the middle of a look-up, as another thread would."""

    meanwhile = None

    def forward(self, input_ids):
        happen, Interrupted.meanwhile = Interrupted.meanwhile, None
        if happen is not None:
            happen()
        return super().forward(input_ids)


def test_a_look_up_in_the_middle_of_another_changes_neither():
    packed, weight = dense(dtype=torch.bfloat16)
    found, others = PackedEmbedding(packed, Interrupted(40, 96)), []
    Interrupted.meanwhile = lambda: others.append(found(torch.tensor([1, 3, 3])))
    assert torch.equal(found(torch.tensor([39, 0])), weight[[39, 0]].to(torch.bfloat16))
    assert torch.equal(others[0], weight[[1, 3, 3]].to(torch.bfloat16))
