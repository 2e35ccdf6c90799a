import pytest
import torch
from torch import nn

from secateur.calibration.statistics import InputSum, ParentInputs, StatisticsCollector
from secateur.errors import ModelError
from tests.feedforward import LINEARS, Feedforward
from tests.pruning.tiny_derivation import calibration, derive_tiny, masks_and_weights
from tests.tiny import save_tiny


def batches(dtype=torch.float32, rows=700):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, rows, 8, generator=generator).to(dtype) for _ in range(3)]


def collect(block, inputs, *, linears=LINEARS, **options):
    with torch.no_grad(), StatisticsCollector(block, linears, **{"stop_early": False} | options) as collector:
        outputs = [collector.run(lambda x=x: block(x)) for x in inputs]
    return collector.results(), outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_a_direct_computation(dtype):
    block = Feedforward().to(dtype)
    inputs = batches(dtype)
    results, _ = collect(block, inputs)
    rows = torch.cat(inputs).reshape(-1, 8)
    with torch.no_grad():
        hidden = block.gate(rows).relu() * block.up(rows)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(results["gate"].sum_squares.double(), (rows.double() ** 2).sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        results["down"].sum_squares.double(), (hidden.double() ** 2).sum(0), rtol=tolerance, atol=0
    )
    assert {one.n_tokens for one in results.values()} == {3 * 2 * 700}
    assert results["gate"].sum_squares.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_features_are_exact_to_float32(dtype):
    """Also in bfloat16, where they are taken in bfloat16 units: the inputs have no more digits."""
    block, inputs = Feedforward().to(dtype), batches(dtype, rows=5000)
    before = torch.get_float32_matmul_precision()
    results, _ = collect(block, inputs, gram=True)
    assert torch.get_float32_matmul_precision() == before
    rows = torch.cat(inputs).reshape(-1, 8).double()
    torch.testing.assert_close(results["gate"].gram.double(), rows.T @ rows, rtol=1e-5, atol=1e-2)
    assert results["gate"].gram is results["up"].gram
    assert results["down"].gram.shape == (20, 20)
    assert collect(block, inputs)[0]["gate"].gram is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_tokens_count_as_many_in_products(dtype):
    block, inputs = Feedforward().to(dtype), batches(dtype)
    results, _ = collect(block, inputs, gram=True, first_weight=50.0)
    plain, _ = collect(block, inputs, gram=True)
    rows = torch.cat(inputs).double()
    wanted = rows.flatten(0, 1).T @ rows.flatten(0, 1) + 49 * rows[:, 0].T @ rows[:, 0]
    torch.testing.assert_close(results["gate"].gram.double(), wanted, rtol=1e-5, atol=1e-2)
    for name in LINEARS:
        assert torch.equal(results[name].sum_squares, plain[name].sum_squares)
        assert results[name].n_tokens == plain[name].n_tokens
    # Rows that come without their places in the sequence all count once.
    flat, _ = collect(block, [one.flatten(0, 1) for one in inputs], gram=True, first_weight=50.0)
    torch.testing.assert_close(flat["gate"].gram, plain["gate"].gram, rtol=1e-5, atol=1e-2)


def parents_of(inputs):
    return [x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 12])
def test_products_with_what_the_parent_receives(dtype, rows):
    """Rows of `cross` belong to the parent's features, columns to those of the inputs that are summed.

    A weight that is alone with its input and has at most half as many outputs gets products with the parent's outputs.
    """
    inputs = batches(dtype, rows=2500)
    parents = [one.to(dtype) for one in parents_of([x.float() for x in inputs])]
    weight = torch.randn(rows, 8, generator=torch.Generator().manual_seed(9)).to(dtype)
    total = InputSum(8, torch.device("cpu"), gram=True, first_weight=50.0)
    for x, z in zip(inputs, parents, strict=True):
        total.add(x, ParentInputs.of(z, [weight]))
    found = total.result("down")
    times = torch.ones(2, 2500, 1, dtype=torch.float64)
    times[:, 0] = 50
    x, z = (torch.cat([one.double() for one in some]) for some in (inputs, parents))
    counted = (x * times.repeat(3, 1, 1)).flatten(0, 1)
    torch.testing.assert_close(found.gram.double(), x.flatten(0, 1).T @ counted, rtol=1e-5, atol=1e-1)
    if rows == 3:
        outputs = z.flatten(0, 1) @ weight.double().T
        torch.testing.assert_close(found.parent_outputs.double(), outputs.T @ counted, rtol=1e-4, atol=1e-1)
        assert found.cross is None
    else:
        torch.testing.assert_close(found.cross.double(), z.flatten(0, 1).T @ counted, rtol=1e-4, atol=1e-1)
        assert found.parent_outputs is None
    assert found.n_tokens == 3 * 2 * 2500


def test_weights_that_share_an_input_have_no_products_with_outputs():
    """Not even where the first of them has few, as keys and values of grouped queries do."""
    x, z, _ = batches()
    total = InputSum(8, torch.device("cpu"), gram=True, first_weight=1.0)
    total.add(x, ParentInputs.of(z, [torch.randn(2, 8), torch.randn(8, 8)]))
    found = total.result("key")
    assert found.parent_outputs is None
    expected = z.reshape(-1, 8).double().T @ x.reshape(-1, 8).double()
    torch.testing.assert_close(found.cross.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_watching_changes_no_input_and_no_output(dtype):
    block, inputs = Feedforward().to(dtype), batches(dtype)
    before = [x.clone() for x in inputs]
    with torch.no_grad():
        wanted = [block(x) for x in inputs]
    _, outputs = collect(block, inputs)
    assert all(map(torch.equal, inputs, before))
    assert all(map(torch.equal, outputs, wanted))


def test_many_small_numbers_are_not_lost_beside_a_large_sum():
    """200,000 squares of 1e-3 beside one of 1e4: a plain float32 sum would miss most of them."""
    x = torch.full((1, 200_000, 8), 1e-3)
    x[0, 0] = 1e2
    results, _ = collect(nn.ModuleDict({"a": nn.Linear(8, 1)})["a"], [], linears=())
    assert results == {}
    block = nn.Sequential(nn.Linear(8, 1))
    found, _ = collect(block, [x], linears=("0",))
    wanted = (x.double() ** 2).sum((0, 1)).float()
    torch.testing.assert_close(found["0"].sum_squares, wanted, rtol=1e-7, atol=0)


def test_the_size_of_a_batch_changes_nothing_beyond_rounding():
    block, inputs = Feedforward(), batches()
    many, _ = collect(block, inputs)
    one, _ = collect(block, [torch.cat(inputs)])
    for name in LINEARS:
        torch.testing.assert_close(many[name].sum_squares, one[name].sum_squares, rtol=1e-6, atol=0)
        assert many[name].n_tokens == one[name].n_tokens


def test_weights_with_one_input_share_one_statistic():
    results, _ = collect(Feedforward(), batches())
    assert results["gate"] is results["up"]
    assert results["gate"] is not results["down"]


def test_equal_inputs_that_are_other_tensors_are_not_one():
    class Copies(Feedforward):
        def forward(self, x):
            return self.down(self.gate(x).relu() * self.up(x.clone()))

    results, _ = collect(Copies(), batches())
    assert results["gate"] is not results["up"]
    assert torch.equal(results["gate"].sum_squares, results["up"].sum_squares)
    assert results["gate"].n_tokens == results["up"].n_tokens == 3 * 2 * 700


def test_stopping_early_computes_less_and_finds_the_same():
    whole, _ = collect(Feedforward(), batches())
    block = Feedforward()
    early, outputs = collect(block, batches(), stop_early=True)
    for name in LINEARS:
        assert torch.equal(early[name].sum_squares, whole[name].sum_squares)
        assert early[name].n_tokens == whole[name].n_tokens
    # The first batch tells which weight comes last; from then on that one is never computed.
    assert block.runs == ["gate", "up", "down", "gate", "up", "gate", "up"]
    assert outputs[0] is not None
    assert outputs[1:] == [None, None]


def test_a_block_that_uses_a_weight_twice_is_never_stopped():
    class Twice(Feedforward):
        def forward(self, x):
            return self.down(self.gate(super().forward(x)).relu())

    block, inputs = Twice(), batches()
    results, outputs = collect(block, inputs, stop_early=True)
    assert all(output is not None for output in outputs)
    assert results["down"].n_tokens == 2 * 3 * 2 * 700


def test_a_weight_that_is_never_used_is_an_error():
    with pytest.raises(ModelError, match="unused received no input"):
        collect(Feedforward(), batches(), linears=(*LINEARS, "unused"))


def test_sharing_in_one_batch_but_not_in_another_is_an_error():
    class Moody(Feedforward):
        def forward(self, x):
            return self.down(self.gate(x).relu() * self.up(x if self.runs.count("down") else x.clone()))

    with pytest.raises(ModelError, match="up shared its input with up in one batch but not in another"):
        collect(Moody(), batches())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_an_error(value):
    inputs = batches()
    inputs[1][0, 3, 2] = value
    with pytest.raises(ModelError, match="the inputs of gate are not finite"):
        collect(Feedforward(), inputs)


def test_hooks_are_gone_afterwards():
    block = Feedforward()
    collect(block, batches())
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_overflow_names_the_block(tmp_path):
    """Weights of 3e38 are finite, what they make of an input is not."""
    import safetensors.torch

    base = save_tiny(tmp_path / "base", dtype=torch.float32)
    weights = safetensors.torch.load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    safetensors.torch.save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1: the inputs of mlp\.down_proj are not finite"):
        derive_tiny(base, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("propagate", [True, False])
def test_masks_do_not_depend_on_the_batch(tmp_path, monkeypatch, propagate):
    base = save_tiny(tmp_path / "base", "gemma3", dtype=torch.float32)
    found = []
    for tokens in (1, 100, 10**6):  # one sequence at a time, two (and one left over), all five
        monkeypatch.setattr("secateur.pruning.job.TOKENS_PER_BATCH", tokens)
        derive_tiny(base, tmp_path / f"out{tokens}", calibration=calibration(), propagate=propagate)
        found.append(masks_and_weights(tmp_path / f"out{tokens}"))
    for name in found[0]:
        assert torch.equal(found[0][name][0], found[1][name][0]), name
        assert torch.equal(found[0][name][0], found[2][name][0]), name
