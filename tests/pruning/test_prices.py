"""What a model loses by each way of making it smaller, and which way is taken."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.checkpoint.format import MANIFEST, read_json
from secateur.checkpoint.quantise import dequantise, quantise
from secateur.config import make_recipe
from secateur.errors import ConfigError, ModelError, OutputError, ResourceError
from secateur.models.source import ModelFolder
from secateur.pruning import divergence, forecast, sizing
from secateur.pruning import prices as prices_module
from secateur.pruning.base import Base
from secateur.pruning.prices import Prices, cheapest, measure_prices
from secateur.pruning.size import Footprint
from tests.pruning.tiny_derivation import calibration, contents, derive_tiny, interrupt
from tests.tiny import save_tiny

CPU = torch.device("cpu")
SIZES = {"hidden_size": 512, "intermediate_size": 2048}


@pytest.fixture(scope="module", params=["llama", "qwen2"])  # the second has a tied head
def base(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param) / "base", request.param, dtype=torch.float32, **SIZES)


def recipe(**options):
    return make_recipe({"for": "python", "method": "admm", **options})


def silent(_done, _total):
    pass


def measured(base):
    token_ids = torch.from_numpy(calibration().token_ids)
    opened = Base.open(ModelFolder(base, "tiny"))
    return measure_prices(opened, token_ids, recipe(first_token_weight=1.0), CPU, silent)


def divergence_of(theirs, ours, token_ids):
    with torch.inference_mode():
        wanted, found = (model(token_ids).logits.double().log_softmax(-1) for model in (theirs, ours))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_prices_are_divergences_of_whole_models(base, tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "POSITIONS", 5 * 48)  # all of them
    found = measured(base)
    token_ids = torch.from_numpy(calibration().token_ids)
    parent, changed = (AutoModelForCausalLM.from_pretrained(base).eval() for _ in range(2))
    derive_tiny(base, tmp_path / "sub", propagate=False, sparsity=0.5)
    halved = AutoModelForCausalLM.from_pretrained(tmp_path / "sub").eval()
    assert found.halving == pytest.approx(divergence_of(parent, halved, token_ids), rel=1e-3)
    for module in {changed.get_input_embeddings(), changed.get_output_embeddings()}:
        codes = quantise(module.weight.data, None, None, values="nl4", group_size=32)
        module.weight.data = dequantise(codes, values="nl4", group_size=32)
    assert found.small_embedding == pytest.approx(divergence_of(parent, changed, token_ids), rel=1e-3)
    assert found.halving > 0 < found.small_embedding


def test_what_is_lost_grows_with_the_sparsity_and_with_fewer_bits():
    prices = Prices(0.6, 0.05)
    losses = [prices.of(recipe(values="nl4", sparsity=one)) for one in (0.0, 0.2, 0.5, 0.7)]
    assert losses == sorted(losses)
    by_values = [prices.of(recipe(values=one, sparsity=0.5)) for one in ("base", "int8", "nl4")]
    assert by_values == sorted(by_values)
    assert prices.of(recipe(values="base", sparsity=0.0)) == 0
    by_groups = [prices.of(recipe(values="nl4", group_size=one)) for one in (32, 64, 128)]
    assert by_groups == sorted(by_groups)
    small = [prices.of(recipe(values="int8", embedding_values=one)) for one in ("int8", "nl4")]
    assert small[1] - small[0] == pytest.approx(0.05)
    assert prices.of(recipe(values="base", method="wanda")) == pytest.approx(0.6)
    assert prices.of(recipe(values="base")) < 0.5 * prices.of(recipe(values="base", method="wanda"))


QWEN, SMOLLM2 = Prices(0.204, 0.0083), Prices(0.717, 0.121)


@pytest.mark.parametrize(
    ("prices", "options", "loss"),
    [
        (SMOLLM2, {"sparsity": 0.5}, 0.152),
        (SMOLLM2, {"sparsity": 0.6}, 0.320),
        (SMOLLM2, {"values": "int4", "sparsity": 0.374, "budget": "packed"}, 0.111),
        (SMOLLM2, {"values": "int4", "sparsity": 0.5}, 0.209),
        (SMOLLM2, {"values": "nl4", "sparsity": 0.5}, 0.204),
        (SMOLLM2, {"values": "nl4", "sparsity": 0.0}, 0.050),
        (SMOLLM2, {"sparsity": 0.6, "method": "wanda"}, 1.48),
        (QWEN, {"sparsity": 0.5}, 0.112),
        (QWEN, {"sparsity": 0.6}, 0.216),
        (QWEN, {"values": "int4", "sparsity": 0.0, "embedding_values": "int4"}, 0.046),
    ],
)
def test_prices_are_near_what_was_measured(prices, options, loss):
    """Perplexity of held-out Python over the parent's, of docs/results/methods.md and bits.md."""
    assert loss / 1.5 < prices.of(recipe(**options)) < 1.5 * loss


def test_a_small_embedding_is_not_chosen_where_it_costs_more_than_pruning():
    """84 MB of SmolLM2: measured, the first loses 0.111 nats and the second 0.16."""
    pruned = recipe(values="int4", sparsity=0.374, budget="packed")
    whole = recipe(values="int4", group_size=32, sparsity=0.0, embedding_values="int4")
    assert cheapest((whole, pruned), lambda: SMOLLM2) is pruned


@pytest.mark.parametrize(("small_embedding", "embedding"), [(1e-4, "nl4"), (0.5, "int8")])
def test_the_embedding_is_small_where_that_costs_less_than_pruning(
    base, tmp_path, monkeypatch, small_embedding, embedding
):
    """The sparsity that an embedding of eight bits asks for costs some hundredths of what half of the weights do."""
    monkeypatch.setattr("secateur.pruning.sizing.measure_prices", lambda *_, **__: Prices(0.3, small_embedding))
    target = Footprint.of(Base.open(ModelFolder(base, "tiny"))).folder(recipe(values="nl4", sparsity=0.5))
    said = []
    done = derive_tiny(base, tmp_path / "out", target_size=target, announce=said.append)
    chosen = read_json(done.path / MANIFEST)["recipe"]
    assert (chosen["values"], chosen["embedding_values"]) == ("nl4", embedding)
    assert sum(path.stat().st_size for path in done.path.iterdir()) <= target
    said_groups = f"values nl4 in groups of {chosen['group_size']}, embedding {embedding}"
    assert said[0] == f"for {target / 1e6:,.0f} MB: {said_groups}, sparsity {chosen['sparsity']}"
    # Nothing is measured for what is there.
    monkeypatch.setattr("secateur.pruning.sizing.measure_prices", lambda *_, **__: pytest.fail("measured"))
    again = derive_tiny(base, tmp_path / "out", target_size=target, resume=True)
    assert again.log == {}
    with pytest.raises(OutputError, match="exists"):
        derive_tiny(base, tmp_path / "out", target_size=target)
    # Nor is it for another size than that of what is there, finished or begun.
    less = Footprint.of(Base.open(ModelFolder(base, "tiny"))).folder(recipe(values="nl4", sparsity=0.7))
    with pytest.raises(OutputError, match="exists, made with another recipe"):
        derive_tiny(base, tmp_path / "out", target_size=less, resume=True)
    interrupt(base, tmp_path / "begun", values="int4")
    with pytest.raises(ConfigError, match=r"was begun with another recipe"):
        derive_tiny(base, tmp_path / "begun", target_size=target, resume=True)


def test_an_interrupted_derivation_keeps_the_way_that_it_was_begun_with(base, tmp_path, monkeypatch):
    """Another machine may measure a little differently."""
    target = Footprint.of(Base.open(ModelFolder(base, "tiny"))).folder(recipe(values="nl4", sparsity=0.5))
    monkeypatch.setattr("secateur.pruning.sizing.measure_prices", lambda *_, **__: Prices(0.3, 0.5))
    whole = derive_tiny(base, tmp_path / "whole", target_size=target)
    interrupt(base, tmp_path / "out", target_size=target)
    monkeypatch.setattr("secateur.pruning.sizing.measure_prices", lambda *_, **__: Prices(0.3, 1e-4))
    done = derive_tiny(base, tmp_path / "out", target_size=target, resume=True)
    assert contents(done.path) == contents(whole.path)
    assert done.manifest["recipe"]["embedding_values"] == "int8"


def test_what_is_packed_loses_less_where_weights_can_stay_whole():
    """Three tenths removed cost as many bytes as 30% of the weights with 41.7% removed and all others whole."""
    prices = Prices(0.6, 0.05)

    def lost(sparsity, **options):
        rounding = prices.of(recipe(values="nl4", sparsity=0.0))
        return prices.of(recipe(values="nl4", sparsity=sparsity, **options)) - rounding

    assert lost(0.3, budget="packed") == pytest.approx(0.3 * lost(1 / 6 + 1 / 4, budget="packed"))
    assert lost(0.25, budget="packed") == pytest.approx(0.0)
    assert lost(0.35, budget="packed") < lost(0.35, budget="measured")
    assert lost(0.6, budget="packed") == lost(0.6, budget="measured")
    assert prices.of(recipe(budget="packed", sparsity=0.3)) == prices.of(recipe(sparsity=0.3))


def test_int8_is_taken_where_little_has_to_be_removed():
    prices = Prices(0.5, 10.0)
    few = [recipe(values="int8", sparsity=0.1), recipe(values="nl4", sparsity=0.0)]
    many = [recipe(values="int8", sparsity=0.6), recipe(values="nl4", sparsity=0.3)]
    assert [cheapest(one, lambda: prices).values for one in (few, many)] == ["int8", "nl4"]


@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_eight_bits_for_some_lie_between_four_and_eight_for_all(method):
    prices, kinds = Prices(0.5, 0.1), ("nl4", "int4")
    int8 = prices.of(recipe(method=method, values="int8", sparsity=0.0))
    for values, group_size in [(one, size) for one in kinds for size in (32, 64, 128)]:
        options = {"method": method, "values": values, "group_size": group_size, "sparsity": 0.0}
        lost = [prices.of(recipe(**options, eight_bits=share)) for share in (0.0, 0.1, 0.5, 0.95)]
        assert lost == sorted(lost, reverse=True)
        assert int8 < lost[-1] < lost[0] == prices.of(recipe(**options))
        # Those that lose most come first.
        assert lost[0] - lost[1] > 0.1 * (lost[0] - int8)


def test_nothing_is_measured_where_the_answer_is_plain():
    whole, int8 = recipe(values="base", sparsity=0.0), recipe(values="int8", sparsity=0.0)
    smaller = recipe(values="int8", sparsity=0.0, embedding_values="nl4")
    nl4 = recipe(values="nl4", sparsity=0.1, group_size=32)
    mixed = recipe(values="nl4", sparsity=0.0, group_size=32, eight_bits=0.95)
    order = [whole, int8, mixed, smaller, nl4]
    for recipes in ((whole, int8, smaller, mixed, nl4), (mixed, int8), (smaller, nl4, int8), (smaller,), (nl4, mixed)):
        best = min(recipes, key=order.index)
        assert cheapest(recipes, lambda: pytest.fail("measured")) is best


def test_a_model_that_does_not_fit_whole_is_refused_unless_the_kinds_are_given(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    target = Footprint.of(Base.open(ModelFolder(base, "tiny"))).folder(recipe(values="nl4", sparsity=0.5))
    monkeypatch.setattr(forecast, "available_memory", lambda: 4_000_000)
    with pytest.raises(ResourceError, match="--values and --embedding-values beside --target-size"):
        derive_tiny(base, tmp_path / "out", target_size=target)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    derive_tiny(base, tmp_path / "out", target_size=target, values="nl4", embedding_values="int8")
    # Which weights need eight bits is found out with the whole model, too.
    fixed = {"target_size": 3 * target, "values": "nl4", "embedding_values": "int8"}
    with pytest.raises(ResourceError, match=r"which weights need eight bits .* --eight-bits 0"):
        derive_tiny(base, tmp_path / "more", **fixed)
    derive_tiny(base, tmp_path / "more", **fixed, eight_bits=0.0)


def test_a_model_that_gives_no_numbers_is_refused(base, monkeypatch):
    monkeypatch.setattr(prices_module, "mean_divergence", lambda *_: float("nan"))
    with pytest.raises(ModelError, match="made smaller: give --values and --embedding-values"):
        measured(base)
    monkeypatch.setattr(prices_module, "spread_logits", lambda *_: torch.full((2, 3), float("inf")))
    with pytest.raises(ModelError, match="the model itself"):
        measured(base)


def test_text_that_the_model_cannot_take_is_found_before_anything_is_measured(base, tmp_path):
    target = Footprint.of(Base.open(ModelFolder(base, "tiny"))).folder(recipe(values="nl4", sparsity=0.5))
    text = calibration()
    text.token_ids[0, 0] = 384
    with pytest.raises(ModelError, match="was made with another tokenizer"):
        derive_tiny(base, tmp_path / "out", target_size=target, calibration=text)


@pytest.mark.parametrize("change", [{"first_token_weight": 100.0}, {"granularity": "per_layer"}])
def test_prices_depend_on_the_recipe(base, change):
    token_ids = torch.from_numpy(calibration().token_ids)
    opened = Base.open(ModelFolder(base, "tiny"))
    options = {"first_token_weight": 1.0}
    found = [measure_prices(opened, token_ids, recipe(**one), CPU, silent) for one in (options, options | change)]
    assert found[0].halving != found[1].halving
    assert found[0].small_embedding == found[1].small_embedding


@pytest.mark.parametrize(
    ("vocabulary", "rows", "megabytes", "said"),
    [
        (None, 384, 0.1, True),  # 384 tokens are a third of a small model
        (48_000, 384, 0.1, False),
        (None, 384, 100, False),
        (None, 10, 0.1, False),
    ],
)
def test_many_tokens_in_a_small_size_are_worth_a_word(base, monkeypatch, vocabulary, rows, megabytes, said):
    monkeypatch.setattr(sizing, "_MANY_TOKENS", 300)
    opened = Base.open(ModelFolder(base, "tiny"))
    config = opened.model.config.get_text_config(decoder=True)
    monkeypatch.setattr(config, "vocab_size", rows)
    asked = recipe(values="nl4", target_size=round(megabytes * 1e6), vocabulary=vocabulary)
    advice = sizing._advice(opened, asked, recipe(values="nl4"))
    assert ("--vocabulary auto" in advice) == said
    assert bool(advice) == said


@pytest.mark.parametrize("length", [20, 30, 700])
def test_what_the_model_pays_for_a_token(base, length):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    token_ids = torch.randint(0, 250, (3, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = prices_module._nats(divergence.spread_logits(model, token_ids), token_ids)
        everywhere = model(token_ids).logits.log_softmax(-1)
    positions = [one for one in divergence.spread_positions(token_ids).tolist() if one + 1 < length]
    wanted = [-everywhere[row, one, token_ids[row, one + 1]] for row in range(3) for one in positions]
    assert found == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-4)
