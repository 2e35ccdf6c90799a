"""Derivations with fewer tokens: what is recorded, what opens it, going on after an interruption."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.format import CARD, MANIFEST, read_json
from secateur.checkpoint.inspect import inspect
from secateur.config import make_recipe
from secateur.errors import ConfigError, OutputError
from secateur.files import sha256_file
from secateur.models.source import ModelFolder, load_tokenizer
from secateur.pruning import vocabulary_size
from secateur.pruning.base import Base
from secateur.pruning.derive import derive, derive_recipe
from secateur.pruning.prices import Prices
from secateur.pruning.size import Footprint
from secateur.pruning.vocabulary import with_vocabulary
from secateur.pruning.vocabulary_size import Count, cheapest_count
from tests.calibration.texts import word_tokenizer
from tests.pruning.tiny_derivation import Interrupt, contents
from tests.tiny import tiny_model

WORDS = ["value", "while", "return", "unseen", "    "]
SIZE, KEPT = 300, 268
TEXT = "while value: return value\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(20):
        (folder / f"{number}.py").write_text("".join(f"while value{line}: {TEXT}" for line in range(40 + number)))
    return folder


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def base(request, tmp_path_factory):
    """A tied and an untied model."""
    folder = tmp_path_factory.mktemp("vocabulary") / "base"
    tokenizer = word_tokenizer(WORDS)
    named = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = tiny_model(request.param, vocab_size=SIZE, dtype=torch.bfloat16, **named)
    for key, value in named.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(base, text, **options):
    settings = {"vocabulary": KEPT, "samples": 4, "sequence_length": 32, "method": "wanda"}
    return make_recipe({"model": str(base), "for": str(text), **settings, **options})


def test_a_sub_model_has_the_tokens_and_the_weights_of_its_parent(base, text, tmp_path):
    done = derive_recipe(recipe(base, text, sparsity=0.0), output=tmp_path / "out", threads=1)
    record = done.manifest["vocabulary"]
    assert (record["tokens"], record["of"]) == (KEPT, SIZE)
    assert 0 < record["more_tokens"][str(text)] < 1
    tokenizer, old = load_tokenizer(tmp_path / "out"), load_tokenizer(base)
    assert "value" in tokenizer.tokenize(TEXT)
    assert "unseen" in old.tokenize("unseen")
    assert "unseen" not in tokenizer.tokenize("unseen")

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    parent = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert opened.config.vocab_size == KEPT
    rows = old.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(KEPT)))
    for name, weight in opened.state_dict().items():
        whole = parent.state_dict()[name]
        assert torch.equal(weight, whole[rows] if len(whole) == SIZE else whole)

    manifest = read_json(tmp_path / "out" / MANIFEST)["base_model"]
    assert manifest["files"]["model.safetensors"] == sha256_file(base / "model.safetensors")  # of the whole parent
    assert manifest["parameters"] == sum(one.numel() for one in parent.parameters())
    assert f"{KEPT} of {SIZE} tokens" in (tmp_path / "out" / CARD).read_text()
    assert f"{KEPT} of {SIZE} tokens" in inspect(tmp_path / "out", verify=True).describe()


@pytest.mark.parametrize("values", ["base", "int4"])
def test_engines_agree_and_exports_keep_the_tokens(base, text, tmp_path, values):
    derive_recipe(recipe(base, text, values=values), output=tmp_path / "out", threads=1)
    native, torch_ = (secateur.load(tmp_path / "out", engine=engine) for engine in ("native", "torch"))
    token_ids = native.tokenizer.encode(TEXT * 3).ids
    assert token_ids == torch_.tokenizer(TEXT * 3).input_ids
    ours, theirs = (one.backend.log_likelihood(token_ids, 1)[0] for one in (native, torch_))
    # One computes in bfloat16, both round activations of integers; a wrong row of the head would be nats away.
    assert np.abs(ours - theirs).max() < 0.3 < theirs.std()
    export(tmp_path / "out", output=tmp_path / "dense")
    assert read_json(tmp_path / "dense" / "config.json")["vocab_size"] == KEPT
    assert load_tokenizer(tmp_path / "dense").tokenize("value") == ["value"]


def test_a_size_is_reached_with_fewer_tokens_and_less_is_removed(base, text, tmp_path):
    half = recipe(base, text, vocabulary=None, values="int8")
    target = Footprint.of(Base.open(ModelFolder(base, "base"))).folder(half)
    sized = recipe(base, text, values="int8", embedding_values="int8", target_size=target)
    found = derive_recipe(sized, output=tmp_path / "out", threads=1)
    assert sum(file.stat().st_size for file in found.path.iterdir()) <= target
    assert found.manifest["recipe"]["sparsity"] < half.sparsity - 0.005


def test_an_interrupted_run_goes_on_to_the_same_bytes(base, text, tmp_path):
    asked = recipe(base, text, values="int8")
    derive_recipe(asked, output=tmp_path / "whole", threads=1)

    def stop(stage, done, _):
        if (stage, done) == ("prune", 2):
            raise Interrupt

    with pytest.raises(Interrupt):
        derive_recipe(asked, output=tmp_path / "out", threads=1, progress=stop)
    with pytest.raises(ConfigError, match="vocabulary"):
        derive_recipe(
            recipe(base, text, values="int8", vocabulary=KEPT + 1), output=tmp_path / "out", threads=1, resume=True
        )
    derive_recipe(asked, output=tmp_path / "out", threads=1, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(OutputError):
        derive_recipe(asked, output=tmp_path / "out", threads=1)


def test_from_python_a_model_is_given_fewer_tokens_first(base, text, tmp_path):
    smaller = with_vocabulary(ModelFolder(base, str(base)), ((str(text), 1.0),), KEPT)
    calibration = secateur.calibrate(str(text), load_tokenizer(smaller), samples=4, sequence_length=32)
    derive(smaller, calibration, output=tmp_path / "out", method="wanda", threads=1)
    derive_recipe(recipe(base, text), output=tmp_path / "other", threads=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def auto(base, text, target, **options):
    return recipe(base, text, vocabulary="auto", target_size=target, method="admm", **options)


def size_of(base, **options):
    """Bytes of the whole model without pruning."""
    return Footprint.of(Base.open(ModelFolder(base, "tiny"))).folder(recipe(base, "x", sparsity=0.0, **options))


@pytest.mark.parametrize(("nats", "fewest"), [(0.0, True), (1e6, False)])
def test_a_size_has_as_many_tokens_as_serve_best(base, text, tmp_path, monkeypatch, nats, fewest):
    monkeypatch.setattr("secateur.pruning.vocabulary_size._SHARES", (0.95, 0.9, 0.5))
    monkeypatch.setattr("secateur.pruning.sizing.measure_prices", lambda *_, **__: Prices(0.3, 0.1, nats))
    said, target = [], round(0.9 * size_of(base, values="int8"))
    done = derive_recipe(auto(base, text, target), output=tmp_path / "out", threads=1, announce=said.append)
    assert sum(path.stat().st_size for path in done.path.iterdir()) <= target
    kept = done.manifest["recipe"]["vocabulary"]
    assert kept == (270 if fewest else 285)  # with which text is no longer than with all
    assert f"keeps {kept} of {SIZE} tokens" in said[0]
    assert ("0.00% longer" in said[0]) != fewest
    assert AutoModelForCausalLM.from_pretrained(done.path).config.vocab_size <= kept
    # What is there has its tokens, and nothing is measured for it.
    monkeypatch.setattr("secateur.pruning.sizing.measure_prices", lambda *_, **__: pytest.fail("measured"))
    again = derive_recipe(auto(base, text, target), output=tmp_path / "out", threads=1, resume=True)
    assert again.manifest == done.manifest


def test_a_size_that_no_number_of_tokens_reaches(base, text, tmp_path, monkeypatch):
    """What is named is the least with the fewest tokens."""
    monkeypatch.setattr("secateur.pruning.vocabulary_size._SHARES", (0.95, 0.9))
    seen = []
    real = vocabulary_size.ways
    monkeypatch.setattr(vocabulary_size, "ways", lambda *given: (seen.append(given[0]), real(*given))[1])
    with pytest.raises(ConfigError, match="cannot be reached"):
        derive_recipe(auto(base, text, 1000), output=tmp_path / "out", threads=1)
    assert seen[-1] == min(seen, key=lambda one: one.carried)
    assert seen[-1].whole[0][0][0] == 270
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("value", ["many", 0, True, [1], {"a": 1}])
def test_what_is_no_number_of_tokens_is_refused(base, text, value):
    with pytest.raises(ConfigError, match="give a number of tokens"):
        recipe(base, text, vocabulary=value, target_size="1MB")
    with pytest.raises(ConfigError, match="give --target-size"):
        recipe(base, text, vocabulary="auto")


def test_what_is_lost_by_tokens_and_by_weights_is_weighed():
    footprint = Footprint((), (), (), 0)
    many, few = Count(None, 0.0, footprint), Count(100, 0.01, footprint)
    whole, pruned = (make_recipe({"for": "python", "method": "admm", "sparsity": one}) for one in (0.0, 0.2))
    found = {many: (pruned,), few: (whole,)}
    lost = Prices(0.5, 0.0).of(pruned)
    assert cheapest_count(found, Prices(0.5, 0.0, 90 * lost)) is few
    assert cheapest_count(found, Prices(0.5, 0.0, 110 * lost)) is many


def test_a_begun_derivation_has_the_tokens_it_was_begun_with(base, text, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pruning.vocabulary_size._SHARES", (0.95, 0.9, 0.5))
    monkeypatch.setattr("secateur.pruning.sizing.measure_prices", lambda *_, **__: Prices(0.3, 0.1, 0.0))
    target = round(0.9 * size_of(base, values="int8"))
    derive_recipe(auto(base, text, target), output=tmp_path / "whole", threads=1)

    def stop(stage, done, _total):
        if (stage, done) == ("prune", 1):
            raise Interrupt

    with pytest.raises(Interrupt):
        derive_recipe(auto(base, text, target), output=tmp_path / "out", threads=1, progress=stop)
    monkeypatch.setattr("secateur.pruning.sizing.measure_prices", lambda *_, **__: pytest.fail("measured"))
    derive_recipe(auto(base, text, target), output=tmp_path / "out", threads=1, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_size_that_only_fewer_tokens_reach(base, text, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pruning.vocabulary_size._SHARES", (0.95, 0.9))
    monkeypatch.setattr("secateur.pruning.sizing.measure_prices", lambda *_, **__: Prices(0.3, 0.1, 1e9))
    fixed = {"values": "int8", "embedding_values": "int8"}
    least = Footprint.of(Base.open(ModelFolder(base, "tiny"))).folder(recipe(base, text, sparsity=0.9, **fixed))
    with pytest.raises(ConfigError, match="cannot be reached"):
        derive_recipe(recipe(base, text, vocabulary=None, target_size=least - 600, **fixed), output=tmp_path / "all")
    done = derive_recipe(auto(base, text, least - 600, **fixed), output=tmp_path / "out", threads=1)
    assert done.manifest["recipe"]["vocabulary"] == 285
    assert sum(path.stat().st_size for path in done.path.iterdir()) <= least - 600


def test_all_tokens_are_not_advised_against_where_they_were_chosen(base, text, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pruning.vocabulary_size._SHARES", ())
    monkeypatch.setattr("secateur.pruning.sizing._MANY_TOKENS", 10)
    monkeypatch.setattr("secateur.pruning.sizing._MUCH", 0.0)
    said = []
    target = round(0.9 * size_of(base, values="int8"))
    for options in ({"vocabulary": "auto"}, {"vocabulary": None}):
        wanted = recipe(base, text, target_size=target, method="admm", **options)
        derive_recipe(wanted, output=tmp_path / str(len(said)), threads=1, announce=said.append)
    advised = [line for line in said if "--vocabulary auto" in line]
    assert len(advised) == 1
    assert f"keeps all {SIZE} tokens" in said[0]
