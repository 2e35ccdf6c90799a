"""Inputs that are made equally loud: the block stays the same function, and its integers lose less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from secateur.calibration.statistics import InputStatistics
from secateur.checkpoint.quantise import dequantise, quantise
from secateur.models.structure import find_blocks
from secateur.pruning.equalise import (
    HIGHEST,
    LOWEST,
    Inputs,
    Source,
    column_exponents,
    find_source,
    louder,
    quieter,
)
from secateur.pruning.masks import Target, keep_top
from tests.pruning.tiny_derivation import calibration, contents, derive_tiny, interrupt, masks_and_weights
from tests.tiny import FAMILIES, OTHER_FAMILIES, save_tiny, tiny_model


def expected_cost(weight, loudness, exponents, group_size, sparsity):
    kept = keep_top(weight.abs() * loudness.sqrt(), Target(sparsity))
    scaled, quiet = (louder(weight, exponents) * kept).abs(), kept * loudness / 4.0**exponents
    starts = range(0, weight.shape[1], group_size)
    parts = [(scaled[:, a : a + group_size], quiet[:, a : a + group_size]) for a in starts]
    return sum(float((columns.amax(1).square() * squares.sum(1)).sum()) for columns, squares in parts)


@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([32, 64]), st.sampled_from([0.0, 0.5]))
@settings(deadline=None, max_examples=20)
def test_no_single_exponent_could_be_better(seed, width, group_size, sparsity):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, width, generator=rng)
    loudness = torch.randn(width, generator=rng).mul(3).exp()
    exponents = column_exponents([weight], loudness, group_size, sparsity)
    assert exponents.dtype == torch.int64
    assert LOWEST <= int(exponents.min()) <= int(exponents.max()) <= HIGHEST
    found = expected_cost(weight, loudness, exponents, group_size, sparsity)
    assert found <= expected_cost(weight, loudness, torch.zeros_like(exponents), group_size, sparsity) * (1 + 1e-5)
    for position in range(width):
        for move in (-1, 1):
            other = exponents.clone()
            other[position] += move
            if LOWEST <= other[position] <= HIGHEST:
                assert expected_cost(weight, loudness, other, group_size, sparsity) >= found * (1 - 2e-4)


def test_weights_of_one_input_count_by_their_outputs():
    torch.manual_seed(0)
    loud, other, loudness = torch.randn(32, 64), torch.randn(32, 64), torch.randn(64).exp()
    found = column_exponents([loud, other], loudness, 64, 0.5)
    assert torch.equal(found, column_exponents([loud * 1000, other], loudness, 64, 0.5))
    assert not torch.equal(found, column_exponents([loud, loud], loudness, 64, 0.5))


def test_a_loud_input_is_rounded_more_finely():
    torch.manual_seed(0)
    weight, loudness = torch.randn(64, 128), torch.ones(128)
    loudness[[5, 100]] = 1e4
    exponents = column_exponents([weight], loudness, 64, 0.0)
    assert exponents[5] >= 2
    assert exponents[100] >= 2

    def error(exponents):
        scaled, quiet = louder(weight, exponents), loudness / 4.0**exponents
        codes = quantise(scaled, None, quiet, values="int4", group_size=64)
        lost = dequantise(codes, values="int4", group_size=64) - scaled
        return float((lost.square() * quiet).sum())

    assert error(exponents) < 0.3 * error(torch.zeros_like(exponents))


def test_inputs_that_are_always_zero_have_exponents():
    assert column_exponents([torch.randn(3, 64)], torch.zeros(64), 64, 0.5).tolist() == [0] * 64


def test_statistics_are_those_of_the_quieter_input():
    torch.manual_seed(0)
    x, z, exponents = torch.randn(50, 6), torch.randn(50, 6), torch.tensor([0, 1, -2, 3, 0, 10])
    quiet = x / 2.0**exponents
    weight = torch.randn(4, 6)
    found = InputStatistics(x.square().sum(0), 50, x.T @ x, z.T @ x, weight @ z.T @ x).quieter(exponents)
    torch.testing.assert_close(found.sum_squares, quiet.square().sum(0))
    torch.testing.assert_close(found.gram, quiet.T @ quiet)
    torch.testing.assert_close(found.cross, (z / 2.0**exponents).T @ quiet)
    torch.testing.assert_close(found.parent_outputs, louder(weight, exponents) @ (z / 2.0**exponents).T @ quiet)


LAST = ("down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "w2", "out_proj", "ff_out")


def block_of(family, **changes):
    model = tiny_model(family, **changes).eval()
    block = find_blocks(model)[0]
    module = model.get_submodule(block.name)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    seen = {}

    class Seen(Exception):  # noqa: N818 - a signal
        pass

    def keep(_, arguments, keywords):
        seen["call"] = (arguments, keywords)
        raise Seen

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode(), pytest.raises(Seen):
        model(torch.arange(40)[None] % 256, use_cache=False)
    handle.remove()
    arguments, keywords = seen["call"]

    def run():
        with torch.inference_mode():
            out = module(*arguments, **keywords)
        return out[0] if isinstance(out, tuple) else out

    return module, run


@pytest.mark.parametrize(
    ("family", "linears", "source"),
    [
        ("llama", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Source("input_layernorm", False)),
        ("llama", ("self_attn.q_proj", "self_attn.k_proj"), None),  # not all that receive it
        ("llama", ("mlp.gate_proj", "mlp.up_proj"), Source("post_attention_layernorm", False)),
        ("llama", ("mlp.down_proj",), Source("mlp.up_proj", True)),
        ("qwen2", ("mlp.down_proj",), Source("mlp.up_proj", True)),
        ("gemma3_text", ("mlp.down_proj",), Source("mlp.up_proj", True)),
        ("gemma3_text", ("mlp.gate_proj", "mlp.up_proj"), None),  # its norms multiply with 1 + weight
    ],
)
def test_the_source_of_an_input_is_found(family, linears, source):
    module, run = block_of(family)
    before = {name: one.clone() for name, one in module.named_parameters()}
    assert find_source(module, linears, run) == source
    after = dict(module.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


ALL = {**FAMILIES, **OTHER_FAMILIES}
# GELU knows no scale, and the gate and up projection of phi3 are one linear of twice as many outputs.
WITHOUT_SOURCE = {"gpt_bigcode", "phi3", "starcoder2"}


@pytest.mark.parametrize("family", sorted(ALL))
def test_every_family_stays_the_same_function(family):
    module, run = block_of("gemma3_text" if family == "gemma3" else family)
    before = run()
    linears = [name for name, one in module.named_modules() if isinstance(one, nn.Linear)]
    last = [name for name in linears if name.rpartition(".")[2] in LAST]
    assert last
    source = find_source(module, last[:1], run)
    assert (source is None) == (family in WITHOUT_SOURCE)
    if source is not None:
        weight = module.get_parameter(f"{last[0]}.weight").data
        exponents = torch.randint(LOWEST, HIGHEST, (weight.shape[1],))
        module.get_parameter(f"{last[0]}.weight").data = louder(weight, exponents)
        for full, one in quieter(source.parameters(module), exponents).items():
            module.get_parameter(full).data = one
        assert torch.equal(run(), before)


def test_values_are_the_source_of_what_attention_puts_out():
    module, run = block_of("qwen2", num_key_value_heads=4)
    assert find_source(module, ("self_attn.o_proj",), run) == Source("self_attn.v_proj", True)
    grouped, run = block_of("qwen2")  # a value serves several heads
    assert find_source(grouped, ("self_attn.o_proj",), run) is None


def test_values_that_are_clamped_are_no_source():
    """OLMo may clip them between the two linears: with louder ones it would be another function."""
    free, run = block_of("olmo", num_key_value_heads=4)
    seen = []
    free.self_attn.v_proj.register_forward_hook(lambda _, inputs, output: seen.append(float(output.abs().max())))
    assert find_source(free, ("self_attn.o_proj",), run) == Source("self_attn.v_proj", True)
    module, run = block_of("olmo", num_key_value_heads=4, clip_qkv=3 * seen[0])
    assert find_source(module, ("self_attn.o_proj",), run) is None


def test_linears_that_no_text_reaches_tell_nothing():
    module, run = block_of("llama")
    fixed = run()
    assert find_source(module, ("mlp.down_proj",), lambda: fixed) is None


@pytest.fixture
def loud(tmp_path):
    """A tiny model with one loud feature of each MLP."""
    base = save_tiny(tmp_path / "base", dtype=torch.float32)
    path = base / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "up_proj" in name:
            tensors[name][7] *= 300
        if "down_proj" in name:
            tensors[name][:, 7] *= 0.05
    save_file(tensors, path, {"format": "pt"})
    return base


def outputs(folder):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(torch.arange(64)[None]).logits


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_int4_of_a_loud_model_loses_less(loud, tmp_path, sparsity, monkeypatch):
    options = {"method": "admm", "sparsity": sparsity, "first_token_weight": 1.0}
    whole = outputs(derive_tiny(loud, tmp_path / "floats", **options).path)
    ours = outputs(derive_tiny(loud, tmp_path / "ours", values="int4", **options).path)
    monkeypatch.setattr(Inputs, "equalised", lambda self, *_: self)
    plain = outputs(derive_tiny(loud, tmp_path / "plain", values="int4", **options).path)
    assert (ours - whole).square().mean() < 0.7 * (plain - whole).square().mean()


def test_the_mask_does_not_change(loud, tmp_path):
    options = {"method": "admm", "correction": 0.0, "propagate": False}
    floats = masks_and_weights(derive_tiny(loud, tmp_path / "floats", **options).path)
    ours = masks_and_weights(derive_tiny(loud, tmp_path / "ours", values="int4", **options).path)
    for name, (mask, _) in floats.items():
        assert torch.equal(mask, ours[name][0]), name


def test_an_interrupted_run_goes_on_to_the_same_bytes(loud, tmp_path):
    options = {"method": "admm", "values": "int4"}
    whole = derive_tiny(loud, tmp_path / "whole", **options)
    interrupt(loud, tmp_path / "out", **options)
    assert contents(derive_tiny(loud, tmp_path / "out", resume=True, **options).path) == contents(whole.path)


def test_recovery_learns_from_what_is_equally_loud(loud, tmp_path, monkeypatch):
    options = {"method": "admm", "recovery": calibration(samples=300, seed=1)}
    whole = outputs(derive_tiny(loud, tmp_path / "floats", **options).path)
    ours = outputs(derive_tiny(loud, tmp_path / "ours", values="int4", **options).path)
    monkeypatch.setattr(Inputs, "equalised", lambda self, *_: self)
    plain = outputs(derive_tiny(loud, tmp_path / "plain", values="int4", **options).path)
    assert (ours - whole).square().mean() < 0.8 * (plain - whole).square().mean()


def test_recovery_makes_inputs_loud_for_the_groups_that_weights_will_have(loud, tmp_path, monkeypatch):
    options = {"method": "admm", "values": "nl4", "group_size": 32, "sparsity": 0.0, "eight_bits": 0.5}
    real, seen = Inputs.equalised, []

    def watched(self, block, source, group_size, sparsity):
        seen.append((self.linears, group_size))
        return real(self, block, source, group_size, sparsity)

    monkeypatch.setattr(Inputs, "equalised", watched)
    derive_tiny(loud, tmp_path / "ours", **options)
    alone = seen.copy()
    seen.clear()
    derive_tiny(loud, tmp_path / "learnt", recovery=calibration(samples=8, seed=1), **options)
    assert seen == alone
    assert {size for _, size in seen} == {32, 128}
