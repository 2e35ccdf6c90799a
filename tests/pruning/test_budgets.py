"""Budgets: the formula against plain arithmetic, what it goes by against whole models, and derivations with it."""

import copy
import itertools
import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from secateur.checkpoint.format import BUDGET, Encoding, check_quantization_config, read_json
from secateur.errors import ConfigError, ModelError, ResourceError
from secateur.models.structure import Block, find_blocks
from secateur.pruning.budgets import BUDGETS, GROWTH, REACH, share_that_is_pruned
from secateur.pruning.divergence import measure_divergence, parts, wanda_pruned
from secateur.pruning.masks import Target
from secateur.pruning.size import weight_bytes
from tests.pruning.tiny_derivation import calibration, contents, derive_tiny, interrupt, masks_and_weights, shards
from tests.tiny import FAMILIES, OTHER_FAMILIES, save_tiny, tiny_model

HALVED = partial(wanda_pruned, target=Target(0.5))
SHAPES = {"a.q": (300, 1000), "a.o": (700, 1000), "b": (2000, 500), "c": (1000, 4000)}


def size(shape, sparsity, values="int4"):
    group_size = {"int4": 64, "int8": 128, "bf16": 0}[values]
    return weight_bytes(shape, Encoding(values, group_size), 2, sparsity, "per_output")


def share(shapes, sparsity, divergence, budget="measured", size=size):
    return BUDGETS.get(budget).function(shapes, sparsity, divergence, size)


def bytes_of(shapes, found, size=size):
    return sum(size(shapes[name], one) for name, one in found.items())


def removed(shapes, found):
    return sum(rows * round(found[name] * columns) for name, (rows, columns) in shapes.items())


def test_uniform_gives_all_the_same():
    assert share({"a": (3, 1), "b": (1, 5)}, 0.3, {}, "uniform") == {"a": 0.3, "b": 0.3}


def test_measured_equals_the_formula():
    divergence = {("a.q", "a.o"): 0.02, ("b",): 0.01, ("c",): 0.04}
    found = share(SHAPES, 0.5, divergence)
    # Per weight they lose alike, but the second half as much: so it goes ln(2) / GROWTH further than the others.
    assert found["a.q"] == found["a.o"]
    assert found["b"] - found["a.q"] == pytest.approx(math.log(2) / GROWTH, abs=2e-4)
    assert found["c"] - found["a.q"] == pytest.approx(math.log(2) / GROWTH, abs=2e-4)
    assert removed(SHAPES, found) == pytest.approx(3_000_000, rel=1e-3)


def test_the_sum_of_losses_is_least():
    divergence = {("a.q", "a.o"): 0.02, ("b",): 0.011, ("c",): 0.03}
    found = share(SHAPES, 0.6, divergence)

    def loss(shares):
        return sum(d * math.exp(GROWTH * (shares[names[0]] - 0.6)) for names, d in divergence.items())

    least = loss(found)
    assert least < loss(dict.fromkeys(SHAPES, 0.6))
    for move in (0.01, -0.01):  # from b to c, which has four times as many entries
        assert least < loss({**found, "b": found["b"] + move, "c": found["c"] - move / 4})


@given(
    st.floats(0.01, 0.99),
    st.lists(st.floats(0, 10), min_size=3, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_measured_removes_what_was_asked_for_and_stays_in_reach(sparsity, losses):
    divergence = dict(zip([("a.q", "a.o"), ("b",), ("c",)], losses, strict=True))
    found = share(SHAPES, sparsity, divergence)
    wanted = removed(SHAPES, dict.fromkeys(SHAPES, sparsity))
    assert wanted <= removed(SHAPES, found) <= wanted + 0.002 * 6_000_000
    assert all(0 < one < 1 and abs(one - sparsity) <= REACH + 1e-4 for one in found.values())


@pytest.mark.parametrize("divergence", [{("a.q", "a.o"): 0.0, ("b",): 0.0, ("c",): 0.0}, {}])
def test_measured_is_uniform_where_nothing_is_lost(divergence):
    assert share(SHAPES, 0.5, divergence) == dict.fromkeys(SHAPES, 0.5)


def test_nothing_is_removed_at_zero():
    assert share(SHAPES, 0.0, {("a.q", "a.o"): 0.1, ("b",): 0.2, ("c",): 0.3}) == dict.fromkeys(SHAPES, 0.0)


ALIKE = {f"p{i}": (512, 4096) for i in range(12)}


def total_loss(divergence, found, sparsity):
    return sum(
        d * math.exp(GROWTH * (found[names[0]] - sparsity)) for names, d in divergence.items() if found[names[0]]
    )


@pytest.mark.parametrize(("values", "sparsity"), [("int4", 0.3), ("int4", 0.37), ("int8", 0.2)])
def test_packed_leaves_weights_whole_rather_than_removing_little(values, sparsity):
    """With four bits 1/6 + 1/4 of a weight are removed or nothing, with eight 1/6 + 1/8."""

    def cost(shape, sparsity):
        return size(shape, sparsity, values)

    divergence = {(name,): 0.01 for name in ALIKE}
    found = share(ALIKE, sparsity, divergence, "packed", cost)
    whole = [name for name, one in found.items() if one == 0]
    least = 1 / 6 + {"int4": 1 / 4, "int8": 1 / 8}[values]
    assert 0 < len(whole) < len(ALIKE)
    assert min(one for one in found.values() if one) > least - 0.06  # what was left of the bytes went to these
    allowed = bytes_of(ALIKE, dict.fromkeys(ALIKE, sparsity), cost)
    assert 0.995 * allowed <= bytes_of(ALIKE, found, cost) <= allowed
    assert total_loss(divergence, found, sparsity) < 0.96 * sum(divergence.values())
    pruned, reached = share_that_is_pruned(sparsity, {"int4": 4, "int8": 8}[values])
    assert pruned == pytest.approx(1 - len(whole) / 12, abs=0.15)
    assert reached == pytest.approx(least)


def test_packed_leaves_those_whole_that_lose_most():
    divergence = {(name,): 0.001 * 1.3**i for i, name in enumerate(ALIKE)}
    found = list(share(ALIKE, 0.45, divergence, "packed").values())
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0 < found[0]
    measured = share(ALIKE, 0.45, divergence)
    assert total_loss(divergence, dict(zip(ALIKE, found, strict=True)), 0.45) < total_loss(divergence, measured, 0.45)


def test_packed_is_near_the_best_of_all_choices():
    """Enumerated: three parts, each whole or at one of many sparsities, with no more bytes."""
    divergence = {("a.q", "a.o"): 0.02, ("b",): 0.011, ("c",): 0.09}
    allowed = bytes_of(SHAPES, dict.fromkeys(SHAPES, 0.4))
    grid = [0.0, *(0.2 + 0.01 * i for i in range(41))]

    def spread(choice):
        return {name: one for names, one in zip(divergence, choice, strict=True) for name in names}

    choices = [spread(choice) for choice in itertools.product(grid, repeat=3)]
    best = min(total_loss(divergence, one, 0.4) for one in choices if bytes_of(SHAPES, one) <= allowed)
    found = share(SHAPES, 0.4, divergence, "packed")
    assert bytes_of(SHAPES, found) <= allowed
    assert total_loss(divergence, found, 0.4) <= 1.05 * best  # three parts leave much over


@given(
    st.floats(0.01, 0.89),
    st.lists(st.floats(0, 10), min_size=3, max_size=3),
    st.sampled_from(["int4", "int8", "bf16"]),
)
@settings(max_examples=60, deadline=None)
def test_packed_takes_no_more_bytes_than_the_same_sparsity_everywhere(sparsity, losses, values):
    def cost(shape, sparsity):
        return size(shape, sparsity, values)

    divergence = dict(zip([("a.q", "a.o"), ("b",), ("c",)], losses, strict=True))
    found = share(SHAPES, sparsity, divergence, "packed", cost)
    assert found.keys() == SHAPES.keys()
    assert bytes_of(SHAPES, found, cost) <= bytes_of(SHAPES, dict.fromkeys(SHAPES, sparsity), cost)
    assert all(one == 0 or abs(one - sparsity) <= REACH + 1e-4 for one in found.values())


def test_packed_removes_nothing_where_a_bitmask_saves_nothing():
    divergence = {("a.q", "a.o"): 0.02, ("b",): 0.01, ("c",): 0.04}
    assert share(SHAPES, 0.2, divergence, "packed") == dict.fromkeys(SHAPES, 0.0)
    assert min(share(SHAPES, 0.2, divergence, "packed", lambda *one: size(*one, "bf16")).values()) > 0.1


def test_parts_are_the_modules_of_a_block():
    block = Block(0, "layers.0", ("self_attn.q", "self_attn.o", "mlp.up", "mlp.experts.0.up", "fc1", "fc2"))
    assert parts(block) == [("self_attn.q", "self_attn.o"), ("mlp.up", "mlp.experts.0.up"), ("fc1", "fc2")]


def received(model, module, token_ids):
    seen = []
    handle = module.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    model(token_ids)
    handle.remove()
    return seen[0]


def reference(model, token_ids, sparsity, first_weight, positions=slice(None), tokens=slice(None)):
    """The same by whole passes: hooks on the whole model, weights replaced."""
    found = {}
    with torch.no_grad():
        wanted = model(token_ids).logits[:, positions][..., tokens].double().log_softmax(-1)
        for block in find_blocks(model):
            for linears in parts(block):
                pruned = copy.deepcopy(model)
                for linear in linears:
                    module = model.get_submodule(f"{block.name}.{linear}")
                    squares = received(model, module, token_ids).double().square()
                    if squares.ndim == 3:  # OPT's MLP gets all tokens in a row
                        squares[:, 0] *= first_weight
                    score = module.weight.double().abs() * squares.flatten(0, -2).sum(0).sqrt()
                    order = score.argsort(dim=1, stable=True)[:, : round(sparsity * score.shape[1])]
                    pruned.get_submodule(f"{block.name}.{linear}").weight.scatter_(1, order, 0.0)
                ours = pruned(token_ids).logits[:, positions][..., tokens].double().log_softmax(-1)
                names = tuple(f"{block.name}.{linear}.weight" for linear in linears)
                found[names] = (wanted.exp() * (wanted - ours)).sum(-1).mean().item()
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_divergence_equals_that_of_whole_passes(family):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    token_ids, steps = torch.from_numpy(calibration().token_ids), []
    expected = reference(model, token_ids, 0.5, 100.0)
    found = measure_divergence(
        model, find_blocks(model), token_ids, HALVED, 100.0, lambda done, n: steps.append((done, n))
    )
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=0.02, abs=1e-5)
    assert min(found.values()) > 0
    assert steps == [(i, len(find_blocks(model))) for i in range(len(find_blocks(model)) + 1)]
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items()), "the model is as it was"


def test_divergence_of_some_tokens_at_some_positions(monkeypatch):
    monkeypatch.setattr("secateur.pruning.divergence.TOKENS", 96)
    monkeypatch.setattr("secateur.pruning.divergence.POSITIONS", 8)
    model, token_ids = tiny_model("llama"), torch.from_numpy(calibration().token_ids)
    found = measure_divergence(model, find_blocks(model), token_ids, HALVED, 1.0, lambda *_: None)
    expected = reference(model, token_ids[:2], 0.5, 1.0, slice(11, None, 12))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=0.02, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "cohere", "gpt_bigcode"])
def test_divergence_of_the_likeliest_tokens(family, monkeypatch):
    """Heads of their own, tied ones, logits that are capped, and logits that are scaled."""
    monkeypatch.setattr("secateur.pruning.likely_tokens.LIKELIEST", 50)
    model = tiny_model(family)
    before, token_ids = copy.deepcopy(model.state_dict()), torch.from_numpy(calibration().token_ids)
    with torch.no_grad():
        mean = model(token_ids).logits.flatten(0, 1).softmax(-1).mean(0)
    expected = reference(model, token_ids, 0.5, 1.0, tokens=mean.topk(50).indices)
    found = measure_divergence(model, find_blocks(model), token_ids, HALVED, 1.0, lambda *_: None)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=0.02, abs=1e-5)
    assert list(found.values()) != pytest.approx(list(reference(model, token_ids, 0.5, 1.0).values()), rel=0.02)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items()), "the model is as it was"


def test_nothing_is_measured_where_nothing_is_removed(base, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pruning.allotment.measure_divergence", None)
    monkeypatch.setattr("secateur.pruning.forecast.available_memory", lambda: 4_000_000)
    done = derive_tiny(base, tmp_path / "out", budget="measured", sparsity=0.0)
    assert done.manifest["kept_weights"] == done.manifest["prunable_weights"]


def test_probabilities_that_are_no_numbers_are_an_error():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    token_ids = torch.from_numpy(calibration().token_ids)
    with pytest.raises(ModelError, match=r"model.layers.0 gives probabilities that are no numbers"):
        measure_divergence(model, find_blocks(model), token_ids, HALVED, 1.0, lambda *_: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("budgets") / "base")


@pytest.fixture(scope="module")
def undisturbed(base):
    derive_tiny(base, base.parent / "undisturbed", budget="measured")
    return contents(base.parent / "undisturbed")


def test_a_derivation_removes_what_its_budget_says(base, undisturbed, tmp_path):
    stages = []
    done = derive_tiny(base, tmp_path / "out", budget="measured", progress=lambda stage, *_: stages.append(stage))
    assert stages.index("budget") < stages.index("prune")
    assert contents(tmp_path / "out") == undisturbed
    assert not (tmp_path / "out" / BUDGET).exists()
    masks = masks_and_weights(tmp_path / "out")
    shares = {name: 1 - mask.float().mean().item() for name, (mask, _) in masks.items()}
    by_part = {}
    for name, one in shares.items():
        by_part.setdefault(name.rsplit(".", 2)[0], []).append(one)
    assert all(max(ones) - min(ones) < 0.02 for ones in by_part.values()), "rounding to whole entries of a row"
    assert max(shares.values()) - min(shares.values()) > 0.05
    assert done.manifest["kept_weights"] == pytest.approx(0.5 * done.manifest["prunable_weights"], rel=0.01)


def test_an_interrupted_derivation_keeps_its_budget(base, undisturbed, tmp_path, monkeypatch):
    partial = interrupt(base, tmp_path / "out", budget="measured")
    shares = json.loads((partial / BUDGET).read_text())
    monkeypatch.setattr("secateur.pruning.allotment.measure_divergence", None)  # it is not measured again
    derive_tiny(base, tmp_path / "out", budget="measured", resume=True)
    assert contents(tmp_path / "out") == undisturbed
    assert set(shares) == set(masks_and_weights(tmp_path / "out"))


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "half", "text"])
def test_a_damaged_budget_is_measured_again(base, undisturbed, tmp_path, damage):
    path = interrupt(base, tmp_path / "out", budget="measured") / BUDGET
    text = path.read_text()
    path.write_text({"half": text[: len(text) // 2], "text": text.replace("0.", '"0."', 1)}.get(damage, damage))
    derive_tiny(base, tmp_path / "out", budget="measured", resume=True)
    assert contents(tmp_path / "out") == undisturbed


def test_another_budget_cannot_go_on(base, tmp_path):
    interrupt(base, tmp_path / "out", budget="measured")
    with pytest.raises(ConfigError, match=r"recipe \(budget\)"):
        derive_tiny(base, tmp_path / "out", resume=True)


def test_a_model_that_does_not_fit_whole_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pruning.forecast.available_memory", lambda: 4_000_000)
    derive_tiny(base, tmp_path / "uniform")
    with pytest.raises(
        ResourceError,
        match=r"measuring a budget, .* or which weights need eight bits holds the whole model.*--budget uniform",
    ):
        derive_tiny(base, tmp_path / "out", budget="measured")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_is_packed_is_smaller_and_keeps_some_weights_whole(tmp_path, family):
    base = save_tiny(tmp_path / "base", family)
    options = {"method": "admm", "values": "int4", "sparsity": 0.5}
    done = derive_tiny(base, tmp_path / "packed", budget="packed", **options)
    derive_tiny(base, tmp_path / "uniform", **options)
    sizes = [sum(map(len, shards(tmp_path / name).values())) for name in ("packed", "uniform")]
    assert sizes[0] <= sizes[1]
    masks = masks_and_weights(tmp_path / "packed")
    whole = {name for name, (mask, _) in masks.items() if mask.all()}
    assert 0 < len(whole) < len(masks)
    config = read_json(tmp_path / "packed" / "config.json")["quantization_config"]
    assert check_quantization_config(config).unmasked == whole
    assert done.manifest["kept_weights"] == sum(int(mask.sum()) for mask, _ in masks.values())
    token_ids = torch.from_numpy(calibration().token_ids[:1])
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / one) for one in ("base", "packed", "uniform")]
    with torch.no_grad():
        wanted, *found = (model(token_ids).logits.log_softmax(-1) for model in models)
    packed, uniform = ((wanted.exp() * (wanted - one)).sum(-1).mean() for one in found)
    assert packed < 0.9 * uniform
    interrupt(base, tmp_path / "again", budget="packed", **options)
    derive_tiny(base, tmp_path / "again", budget="packed", resume=True, **options)
    assert contents(tmp_path / "again") == contents(tmp_path / "packed")


def test_divergences_are_not_measured_at_sparsities_that_tell_nothing(base, tmp_path, monkeypatch):
    seen = []

    def noting(model, blocks, token_ids, change, *rest):
        seen.append(change.keywords["target"].sparsity)
        return measure_divergence(model, blocks, token_ids, change, *rest)

    monkeypatch.setattr("secateur.pruning.allotment.measure_divergence", noting)
    for sparsity in (0.1, 0.6):
        derive_tiny(base, tmp_path / str(sparsity), budget="measured", sparsity=sparsity)
    assert seen == [0.45, 0.6]
