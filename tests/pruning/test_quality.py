"""Sub-models that keep a quality: what is tried, what is measured, and what an interruption leaves."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from secateur.calibration.packing import build_calibration_set
from secateur.checkpoint.format import LOCK, LOG, MANIFEST, read_json
from secateur.config import Recipe, make_recipe
from secateur.errors import ConfigError, CorpusError, OutputError, ResourceError
from secateur.models.products import fast_products
from secateur.models.source import ModelFolder
from secateur.pruning import derive as derive_module
from secateur.pruning import forecast
from secateur.pruning.base import Base
from secateur.pruning.budgets import GROWTH
from secateur.pruning.quality import SAMPLES, Judge, allowed_loss, kept, unseen_text
from secateur.pruning.search import propose, propose_eight_bits, small_embedding_pays
from secateur.pruning.size import Footprint
from secateur.pruning.texts import Texts
from secateur.pruning.trials import TRIALS, Trial, search_folder
from tests.calibration.texts import byte_tokenizer, write_data, write_folder
from tests.pruning.tiny_derivation import Interrupt, calibration, contents, derive_tiny
from tests.tiny import save_tiny

UNSEEN = calibration(samples=6, seed=9).token_ids


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(derive_module, "unseen_text", lambda *_: UNSEEN)
    monkeypatch.setattr(derive_module, "load_tokenizer", lambda _: None)
    return save_tiny(tmp_path / "base", "qwen2")  # whose head is tied


def nats(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    token_ids = torch.from_numpy(UNSEEN)
    with torch.inference_mode(), fast_products():
        logits = model(token_ids).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten()))


@pytest.mark.parametrize("options", [{}, {"values": "int8"}, {"trim_vocabulary": False, "values": "nl4"}])
def test_the_judge_measures_what_transformers_does(base, tmp_path, options):
    judge = Judge(Base.open(ModelFolder(base, "tiny")), UNSEEN, torch.device("cpu"), lambda *_: None)
    assert judge.parent() == pytest.approx(nats(base), rel=1e-5)
    sub = derive_tiny(base, tmp_path / "sub", sparsity=0.6, **options)
    assert judge.submodel(sub.path) == pytest.approx(nats(sub.path), rel=1e-5)
    assert abs(judge.submodel(sub.path) - judge.parent()) > 1e-4


def test_the_judge_rounds_the_embedding_as_it_is_stored(base, tmp_path):
    judge = Judge(Base.open(ModelFolder(base, "tiny")), UNSEEN, torch.device("cpu"), lambda *_: None)
    stored = derive_tiny(base, tmp_path / "sub", sparsity=0.0, values="int8", embedding_values="nl4")
    changed = AutoModelForCausalLM.from_pretrained(base)
    of_stored = AutoModelForCausalLM.from_pretrained(stored.path)
    changed.get_input_embeddings().weight.data = of_stored.get_input_embeddings().weight.data.to(changed.dtype)
    changed.save_pretrained(tmp_path / "changed")
    assert judge.small_embedding() == pytest.approx(nats(tmp_path / "changed"), rel=1e-4)
    assert abs(judge.small_embedding() - judge.parent()) > 1e-5


@pytest.mark.parametrize("lost", [-0.01, 0.0, 1e-4, 0.01, 0.03, 0.05, 0.09, 0.1, 0.2])
def test_an_embedding_of_four_bits_pays_where_the_whole_is_smaller(lost):
    """Held against the sizes of both, each with the sparsity that an allowed loss of 0.1 leaves."""
    entries, saved, at_half = 10_000_000, 1_200_000, 0.12
    footprint = Footprint(((torch.Size((1000, entries // 1000)), 2),), (), (), 0)

    def size(allowed, embedding):
        if allowed <= 0:
            return math.inf
        return embedding + entries / 2 * (1 - (0.5 + math.log(allowed / at_half) / GROWTH))

    smaller = size(0.1 - max(lost, 0), 0) < size(0.1, saved)
    assert small_embedding_pays(lost, 0.1, saved, footprint, "nl4") == smaller
    assert small_embedding_pays(0.0, 0.1, saved, footprint, "nl4")
    assert not small_embedding_pays(0.099, 0.1, saved, footprint, "nl4")


@pytest.mark.usefixtures("fake_judge")
def test_the_embedding_is_small_where_that_pays(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "small_embedding", lambda _: 1.0001)
    made = derive_tiny(base, tmp_path / "out", keep_quality=1 / 1.09)
    assert (made.manifest["values"], made.manifest["recipe"]["embedding_values"]) == ("nl4", "nl4")
    measured = made.log["keep_quality"]
    assert measured["small_embedding"] == pytest.approx(1e-4)
    assert {one["embedding"] for one in measured["trials"]} == {"nl4"}
    assert derive_tiny(base, tmp_path / "out", keep_quality=1 / 1.09, resume=True).log == {}
    # One that nearly uses up the loss is tried where it saves more, and given up where nothing keeps the quality.
    monkeypatch.setattr(Judge, "small_embedding", lambda _: 1.001)
    submodel = Judge.submodel

    def nats_of(judge, folder):
        small = read_json(folder / MANIFEST)["recipe"]["embedding_values"] == "nl4"
        return submodel(judge, folder) + 10 * small

    monkeypatch.setattr(Judge, "submodel", nats_of)
    again = derive_tiny(base, tmp_path / "again", keep_quality=1 / 1.09)
    assert (again.manifest["values"], again.manifest["recipe"]["embedding_values"]) == ("nl4", "int8")
    assert {one["embedding"] for one in again.log["keep_quality"]["trials"]} == {"nl4", "int8"}
    fixed = derive_tiny(base, tmp_path / "fixed", keep_quality=1 / 1.09, embedding_values="int8")
    assert fixed.manifest["recipe"]["embedding_values"] == "int8"
    assert fixed.log["keep_quality"]["small_embedding"] is None


def simulated(loss_at, allowed, values="nl4"):
    """Try what is proposed for a model that loses `loss_at(sparsity)`; return the trials."""
    trials = []
    while (sparsity := propose(trials, values, allowed)) is not None:
        trials.append(Trial(values, sparsity, loss_at(sparsity)))
        assert len(trials) < 12
    return trials


@given(
    st.floats(0.001, 0.5),
    st.floats(3, 12),
    st.floats(0.001, 2.0),
    st.floats(0, 0.1),
    st.sampled_from(["nl4", "int8", "base"]),
)
@example(0.00390625, 3.0, 0.046875, 0.0390625, "nl4")  # most of the loss is that of rounding
def test_the_search_ends_near_the_highest_good_sparsity(at_half, growth, allowed, rounding, values):
    def loss(sparsity):
        return rounding + at_half * math.exp(growth * (sparsity - 0.5)) * (sparsity > 0)

    trials = simulated(loss, allowed, values)
    assert len({trial.sparsity for trial in trials}) == len(trials)
    good = [trial.sparsity for trial in trials if trial.loss <= allowed]
    smallest = {"nl4": 0.28, "int8": 0.155, "base": 0.0925}[values]  # below, a bitmask saves nothing
    exact = max((s / 1000 for s in range(901) if loss(s / 1000) <= allowed), default=None)
    if exact is None:
        assert not good
    elif exact >= smallest + 0.03:
        assert max(good) <= exact + 1e-3
        assert max(good) >= exact - 0.03 or loss(max(good)) > 0.96 * allowed
    else:  # a bitmask would take more than it saves
        assert max(good) <= smallest + 0.03


@given(st.floats(1e-4, 0.5), st.floats(0.3, 6), st.floats(0.001, 0.5))
def test_the_search_ends_near_the_least_share_in_eight_bits(rounding, power, allowed):
    def loss(share):
        return rounding * (1 - share) ** power

    trials = [Trial("nl4", 0.0, rounding)]
    while (share := propose_eight_bits(trials, allowed)) is not None:
        trials.append(Trial("nl4", 0.0, loss(share), eight_bits=share))
        assert len(trials) < 14
    exact = 0 if rounding <= allowed else 1 - (allowed / rounding) ** (1 / power)
    good = [one.eight_bits for one in trials if one.loss <= allowed]
    if exact <= 0.95:
        assert exact - 1e-4 <= min(good) <= exact + 0.0502
    else:
        assert not good or min(good) == 0.95
    assert len({one.eight_bits for one in trials}) == len(trials)


def test_a_sub_model_that_loses_nothing_ends_at_the_highest_sparsity():
    assert max(trial.sparsity for trial in simulated(lambda _: -0.01, 0.1)) == pytest.approx(0.9)


@given(st.floats(0.5, 5), st.floats(0.5, 0.999))
def test_the_allowed_loss_keeps_the_quality(parent, quality):
    assert kept(parent, allowed_loss(parent, quality)) == pytest.approx(quality)


def test_the_result_keeps_the_quality_and_is_a_plain_derivation(base, tmp_path):
    said = []
    done = derive_tiny(base, tmp_path / "out", keep_quality=0.99, values="base", announce=said.append)
    parent, mine = nats(base), nats(done.path)
    assert parent / mine >= 0.99
    measured = read_json(done.path / LOG)["keep_quality"]
    assert measured["parent_nats"] == pytest.approx(parent, rel=1e-5)
    sparsity = done.manifest["recipe"]["sparsity"]
    trial = next(one for one in measured["trials"] if one["sparsity"] == sparsity)
    assert trial["loss"] == pytest.approx(mine - parent, abs=1e-5)
    assert sum("keeps" in line for line in said) == len(measured["trials"]) > 1
    plain = derive_tiny(base, tmp_path / "plain", sparsity=sparsity, values="base")
    assert contents(done.path) == contents(plain.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "plain"]
    again = derive_tiny(base, tmp_path / "out", keep_quality=0.99, values="base", resume=True)
    assert again.log == {}


@pytest.fixture
def fake_judge(monkeypatch):
    """The parent has 1 nat per token; nl4 loses 0.05 and int8 0.001, and all 0.1 for each unit of sparsity.

    With eight bits for a share s of the weights nl4 loses 0.05 (1 - s^2): less than the search expects to save.
    """

    def nats_of(_, folder):
        manifest = read_json(folder / MANIFEST)
        recipe = manifest["recipe"]
        rounding = {"nl4": 0.05 * (1 - recipe["eight_bits"] ** 2), "int8": 0.001}[manifest["values"]]
        return 1 + rounding + 0.1 * recipe["sparsity"]

    monkeypatch.setattr(Judge, "parent", lambda _: 1.0)
    monkeypatch.setattr(Judge, "small_embedding", lambda _: 2.0)
    monkeypatch.setattr(Judge, "submodel", nats_of)


@pytest.mark.usefixtures("fake_judge")
def test_values_that_are_left_open_are_the_smallest_that_keep_it(base, tmp_path):
    easy = derive_tiny(base, tmp_path / "easy", keep_quality=1 / 1.09)
    assert easy.manifest["values"] == "nl4"
    assert easy.manifest["recipe"]["sparsity"] == pytest.approx(0.4, abs=0.03)
    assert easy.manifest["recipe"]["eight_bits"] == 0
    middle = derive_tiny(base, tmp_path / "middle", keep_quality=1 / 1.04)
    assert (middle.manifest["values"], middle.manifest["sparsity"]) == ("nl4", 0)
    assert middle.manifest["recipe"]["eight_bits"] == pytest.approx(math.sqrt(0.2), abs=0.05)
    assert 1 + 0.05 * (1 - middle.manifest["recipe"]["eight_bits"] ** 2) <= 1.04
    high = derive_tiny(base, tmp_path / "high", keep_quality=1 / 1.004)
    assert high.manifest["values"] == "int8"
    assert {one["eight_bits"] for one in high.log["keep_quality"]["trials"]} > {0.0, 0.95}
    with pytest.raises(ConfigError, match=r"cannot be kept: int8, embedding int8, with 0.0% .* --resume"):
        derive_tiny(base, tmp_path / "hard", keep_quality=0.9999)
    # What was measured serves another quality, and what comes out is what a search from the beginning finds.
    done = derive_tiny(base, tmp_path / "hard", keep_quality=1 / 1.02, resume=True)
    fresh = derive_tiny(base, tmp_path / "fresh", keep_quality=1 / 1.02)
    assert done.manifest["values"] == fresh.manifest["values"] == "nl4"
    shares = [one.manifest["recipe"]["eight_bits"] for one in (done, fresh)]
    assert shares == pytest.approx([math.sqrt(0.6)] * 2, abs=0.06)
    tried = [(one["values"], one["sparsity"], one["eight_bits"]) for one in done.log["keep_quality"]["trials"]]
    assert len(set(tried)) == len(tried)
    assert not search_folder(tmp_path / "hard").exists()


@pytest.mark.usefixtures("fake_judge")
def test_a_search_that_an_earlier_version_has_begun_goes_on(base, tmp_path):
    with pytest.raises(ConfigError, match="cannot be kept"):
        derive_tiny(base, tmp_path / "out", keep_quality=0.9999)
    path = search_folder(tmp_path / "out") / TRIALS
    content = read_json(path)
    del content["asked"]["recipe"]["eight_bits"]
    content["trials"] = [one for one in content["trials"] if not one.pop("eight_bits")]
    path.write_text(json.dumps(content))
    done = derive_tiny(base, tmp_path / "out", keep_quality=1 / 1.09, resume=True)
    assert done.manifest["values"] == "nl4"


@pytest.mark.usefixtures("fake_judge")
def test_an_option_that_is_none_now_and_was_not_then_is_another(base, tmp_path):
    with pytest.raises(ConfigError, match="cannot be kept"):
        derive_tiny(base, tmp_path / "out", keep_quality=0.9999)
    path = search_folder(tmp_path / "out") / TRIALS
    content = read_json(path)
    content["asked"]["recipe"]["vocabulary"] = 200
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"begun with another recipe \(vocabulary\)"):
        derive_tiny(base, tmp_path / "out", keep_quality=0.9999, resume=True)


@pytest.mark.usefixtures("fake_judge")
def test_a_search_without_eight_bits_has_none(base, tmp_path):
    done = derive_tiny(base, tmp_path / "out", keep_quality=1 / 1.04, eight_bits=0.0)
    assert {one["eight_bits"] for one in done.log["keep_quality"]["trials"]} == {0.0}
    assert done.manifest["values"] == "int8"


def test_an_interrupted_search_goes_on(base, tmp_path):
    options = {"keep_quality": 0.99, "values": "int8"}
    whole = derive_tiny(base, tmp_path / "whole", **options)
    seen = []

    def stop(stage, done, _total):
        if (stage, done) == ("prune", 1):
            seen.append(stage)
            if len(seen) == 2:  # within the second trial
                raise Interrupt

    with pytest.raises(Interrupt):
        derive_tiny(base, tmp_path / "out", progress=stop, **options)
    assert len(read_json(search_folder(tmp_path / "out") / TRIALS)["trials"]) == 1
    with pytest.raises(OutputError, match="interrupted search"):
        derive_tiny(base, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="another recipe"):
        derive_tiny(base, tmp_path / "out", resume=True, **options, granularity="per_layer")
    done = derive_tiny(base, tmp_path / "out", resume=True, **options)
    assert contents(done.path) == contents(whole.path)
    assert not search_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("content", ['{"nats": "x"}', "{", "[]", '{"nats": 1, "trials": [{}], "asked": {}}'])
def test_damaged_trials_are_refused(base, tmp_path, content):
    search_folder(tmp_path / "out").mkdir()
    (search_folder(tmp_path / "out") / TRIALS).write_text(content)
    with pytest.raises(ConfigError, match="damaged: delete the folder"):
        derive_tiny(base, tmp_path / "out", keep_quality=0.9, resume=True)


def test_a_kill_while_a_trial_is_deleted_does_no_harm(base, tmp_path, monkeypatch):
    options = {"keep_quality": 0.99, "values": "base"}
    whole = derive_tiny(base, tmp_path / "whole", **options)
    rmtree, doomed = shutil.rmtree, []

    def half(path, *arguments, **keywords):
        if ".search" in str(path) and not doomed and any(Path(path).glob("*.safetensors")):
            doomed.append(path)
            next(Path(path).glob("*.safetensors")).unlink()
            raise Interrupt
        rmtree(path, *arguments, **keywords)

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(Interrupt):
        derive_tiny(base, tmp_path / "out", **options)
    done = derive_tiny(base, tmp_path / "out", resume=True, **options)
    assert contents(done.path) == contents(whole.path)
    assert not search_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_the_user_is_left_alone(base, tmp_path, resume):
    folder = search_folder(tmp_path / "out")
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "notes.txt").write_text("x")
    with pytest.raises(OutputError, match="no interrupted search"):
        derive_tiny(base, tmp_path / "out", keep_quality=0.9, resume=resume)
    assert (folder / "mine" / "notes.txt").read_text() == "x"
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(OutputError, match="no interrupted search"):
        derive_tiny(base, tmp_path / "out", keep_quality=0.9, resume=resume)


def test_what_the_user_adds_survives(base, tmp_path):
    def add(stage, *_):
        if stage == "prune":
            (search_folder(tmp_path / "out") / "notes.txt").write_text("x")

    derive_tiny(base, tmp_path / "out", keep_quality=0.9, values="nl4", progress=add)
    assert [path.name for path in search_folder(tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("fake_judge")
def test_only_a_search_for_this_quality_is_finished(base, tmp_path):
    derive_tiny(base, tmp_path / "plain", sparsity=0.9, values="nl4")
    with pytest.raises(OutputError, match="no search for this quality"):
        derive_tiny(base, tmp_path / "plain", keep_quality=0.9, resume=True)
    derive_tiny(base, tmp_path / "out", keep_quality=1 / 1.09, values="nl4")
    assert derive_tiny(base, tmp_path / "out", keep_quality=1 / 1.095, values="nl4", resume=True).log == {}
    with pytest.raises(OutputError, match="no search for this quality"):
        derive_tiny(base, tmp_path / "out", keep_quality=1 / 1.07, values="nl4", resume=True)
    with pytest.raises(OutputError, match="values"):
        derive_tiny(base, tmp_path / "out", keep_quality=1 / 1.09, values="int8", resume=True)


def test_another_base_is_refused(base, tmp_path):
    def stop(stage, done, _):
        if (stage, done) == ("prune", 1):
            raise Interrupt

    with pytest.raises(Interrupt):
        derive_tiny(base, tmp_path / "out", keep_quality=0.99, progress=stop)
    shutil.rmtree(base)
    save_tiny(base, "qwen2", seed=5)
    with pytest.raises(ConfigError, match="begun with another base_model"):
        derive_tiny(base, tmp_path / "out", keep_quality=0.99, resume=True)


def test_two_searches_do_not_share_a_folder(base, tmp_path):
    search_folder(tmp_path / "out").mkdir()
    with (
        FileLock(search_folder(tmp_path / "out") / LOCK),
        pytest.raises(OutputError, match="another process derives into"),
    ):
        derive_tiny(base, tmp_path / "out", keep_quality=0.9, resume=True)


def test_too_little_memory_is_said_before_the_parent_is_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "available_memory", lambda: 1000)
    monkeypatch.setattr(Judge, "parent", lambda _: 1 / 0)
    with pytest.raises(ResourceError, match="quality"):
        derive_tiny(base, tmp_path / "out", keep_quality=0.9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_an_error_before_anything_is_measured_leaves_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "parent", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        derive_tiny(base, tmp_path / "out", keep_quality=0.9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("quality", [0, 1, -0.5, 1.5, float("nan")])
def test_qualities_that_cannot_be(quality):
    with pytest.raises(ConfigError, match="keep_quality"):
        make_recipe({"for": "python", "keep_quality": quality})


@pytest.mark.parametrize("other", [{"sparsity": 0.5}, {"target_size": "1MB"}])
def test_one_of_three_decides(other):
    with pytest.raises(ConfigError, match="decide the same thing"):
        make_recipe({"for": "python", "keep_quality": 0.9, **other})


def test_the_recipe_of_a_result_does_not_name_it():
    recipe = make_recipe({"for": "python", "keep_quality": 0.9})
    assert "keep_quality" not in recipe.to_dict()
    assert Recipe(**recipe.to_dict()).keep_quality is None


@pytest.mark.parametrize("mixture", [(("python", 1.0),), (("python", 0.7), ("java", 0.3))])
@pytest.mark.parametrize("recovered", [0, 5, 30])
def test_unseen_text_shares_nothing_with_what_was_seen(tmp_path, mixture, recovered):
    for domain in ("python", "java"):
        lines = 40 if domain == "python" else 30
        write_folder(tmp_path / domain / "train", [f"{domain} {number}.py" for number in range(60)], lines)
    settings = {"sequence_length": 64, "seed": 3, "data": tmp_path}
    mixture = tuple((str(tmp_path / domain), weight) for domain, weight in mixture)
    tokenizer = byte_tokenizer()
    made = build_calibration_set(mixture, tokenizer, samples=8, **settings)
    learnt = build_calibration_set(mixture, tokenizer, samples=recovered, **settings) if recovered else None
    unseen = unseen_text(Texts(made, learnt), tokenizer, tmp_path)
    assert unseen.shape == (SAMPLES, 64)
    seen = windows(made.token_ids) | (windows(learnt.token_ids) if learnt else set())
    assert not windows(unseen) & seen
    assert len({row.tobytes() for row in unseen}) == SAMPLES


def windows(token_ids, size=40):
    """All stretches of tokens, each of which has a line that occurs once in the corpus."""
    return {row[start : start + size].tobytes() for row in token_ids for start in range(len(row) - size + 1)}


def test_too_little_text_is_an_error(tmp_path):
    for domain in ("python", "java"):
        write_data(tmp_path, domain)
    settings = {"sequence_length": 64, "seed": 3, "data": tmp_path}
    made = build_calibration_set((("python", 1.0),), byte_tokenizer(), samples=8, **settings)
    assert unseen_text(Texts(made, None), byte_tokenizer(), tmp_path).shape == (SAMPLES, 64)
    more = replace(made, token_ids=made.token_ids.repeat(100, axis=0))
    with pytest.raises(CorpusError, match="quality is measured on"):
        unseen_text(Texts(more, None), byte_tokenizer(), tmp_path)


def test_other_text_than_that_of_the_calibration_set_is_refused(tmp_path):
    for name in ("one", "two"):
        write_data(tmp_path / name, "python")
    (tmp_path / "two" / "python").mkdir(exist_ok=True)
    settings = {"sequence_length": 64, "seed": 3}
    made = build_calibration_set((("python", 1.0),), byte_tokenizer(), samples=8, data=tmp_path / "one", **settings)
    other = replace(made, provenance=tuple(replace(one, sha256="0" * 64) for one in made.provenance))
    with pytest.raises(ConfigError, match="name the data folder"):
        unseen_text(Texts(other, None), byte_tokenizer(), tmp_path / "one")
