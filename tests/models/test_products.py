import pytest
import torch
from torch.nn import functional

from secateur.models import products
from secateur.models.likelihood import token_log_likelihood
from secateur.models.products import fast_products, has_units, product_precision
from tests.pruning.tiny_derivation import derive_tiny
from tests.tiny import save_tiny, tiny_model


@pytest.fixture
def no_units(monkeypatch):
    monkeypatch.setattr(products, "has_units", lambda dtype: dtype not in products._UNITS)
    monkeypatch.setattr(products, "_SLAB", 7 * 24)  # 7 rows of a weight with 24 inputs


@pytest.fixture
def widened(monkeypatch):
    """The shapes of the inputs that were multiplied in float32."""
    seen, forward = [], products._forward
    monkeypatch.setattr(products, "_forward", lambda x, *rest: seen.append(tuple(x.shape)) or forward(x, *rest))
    return seen


def operands(dtype, rows=(2, 20), inputs=24, outputs=33):
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(*shape, generator=generator) for shape in ((*rows, inputs), (outputs, inputs), (outputs,))]
    return [one.to(dtype) for one in made]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_that_of_float32_rounded_once(no_units, widened, dtype, bias):
    x, weight, b = operands(dtype)
    b = b if bias else None
    expected = functional.linear(x.double(), weight.double(), None if b is None else b.double())
    with fast_products():
        found = functional.linear(x, weight, b)
    assert widened == [(2, 20, 24)]
    assert found.dtype == dtype
    error = (found.double() - expected).abs() / expected.abs().clamp_min(1e-2)
    assert error.max() <= 0.51 * torch.finfo(dtype).eps


@pytest.mark.parametrize("changed", [{"rows": (products.MIN_ROWS - 1,)}, {"dtype": torch.float32}, {"outputs": 0}])
def test_others_are_left_alone(no_units, widened, changed):
    x, weight, b = operands(**{"dtype": torch.bfloat16} | changed)
    if not len(weight):  # a vector in the place of a matrix
        weight, b = torch.ones(24, dtype=torch.bfloat16), None
    expected = functional.linear(x, weight, b)
    with fast_products():
        assert torch.equal(functional.linear(x, weight, b), expected)
    assert widened == []


def test_nothing_is_widened_outside_the_block_or_with_units(no_units, widened, monkeypatch):
    x, weight, b = operands(torch.bfloat16)
    functional.linear(x, weight, b)
    monkeypatch.setattr(products, "has_units", lambda _: True)
    with fast_products():
        functional.linear(x, weight, b)
    assert widened == []


def test_mixed_types_are_the_error_that_they_were(no_units):
    x, weight, b = operands(torch.bfloat16)
    for mixed in ((x.float(), weight, b), (x, weight, b.float())):
        with fast_products(), pytest.raises(RuntimeError):
            functional.linear(*mixed)


def test_other_devices_are_left_alone(no_units, widened):
    with fast_products():
        assert functional.linear(*(one.to("meta") for one in operands(torch.bfloat16))).shape == (2, 20, 33)
    assert widened == []


@pytest.mark.parametrize("trained", ["inputs", "weight", "bias", "all"])
def test_gradients_are_those_of_float32(no_units, widened, trained):
    leaves = dict(zip(("inputs", "weight", "bias"), operands(torch.bfloat16), strict=True))
    wide = {name: one.double() for name, one in leaves.items()}
    for name in leaves:
        for group in (leaves, wide):
            group[name].requires_grad_(trained in {name, "all"})
    slope = torch.randn(2, 20, 33, generator=torch.Generator().manual_seed(4)).bfloat16()
    with fast_products():
        functional.linear(*leaves.values()).backward(slope)
    functional.linear(*wide.values()).backward(slope.double())
    assert widened
    for name, leaf in leaves.items():
        if trained not in {name, "all"}:
            assert leaf.grad is None
            continue
        assert leaf.grad.dtype == torch.bfloat16
        scale = wide[name].grad.abs().max()
        assert (leaf.grad.double() - wide[name].grad).abs().max() <= 0.004 * scale


def test_a_whole_model_runs_in_them(no_units, widened):
    model = tiny_model("llama").bfloat16()
    token_ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    found = token_log_likelihood(model, token_ids)
    assert len(widened) > 7
    torch.testing.assert_close(found, token_log_likelihood(model.float(), token_ids), atol=0.05, rtol=0.02)


def test_precision_is_lowered_only_where_units_make_that_faster(monkeypatch):
    for units, expected in ((True, "medium"), (False, "highest")):
        monkeypatch.setattr(products, "has_units", lambda _, units=units: units)
        with product_precision("medium", torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == expected
        with product_precision("medium", torch.device("cuda")):  # whose units are its own
            assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_float32_matmul_precision() == "highest"


def test_what_the_processor_says_is_looked_up(monkeypatch):
    known = has_units.__wrapped__  # without its memory
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "avx512_fp16": False})
    assert [known(one) for one in kinds] == [True, False, True]
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as before torch 2.11
    assert [known(one) for one in kinds] == [False, False, True]


def test_derivations_run_in_them(no_units, widened, tmp_path):
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    derive_tiny(base, tmp_path / "sub", method="admm")
    assert len(widened) > 7


def test_the_names_are_those_of_torch():
    if not hasattr(torch.cpu, "get_capabilities") or torch.cpu.get_capabilities()["architecture"] != "x86_64":
        pytest.skip("names of x86")
    assert {"avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16"} <= torch.cpu.get_capabilities().keys()
