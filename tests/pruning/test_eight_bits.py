"""Some weights in eight bits where the others have four: which, how they are stored and read, and how many."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from secateur.checkpoint.export import export
from secateur.checkpoint.format import BUDGET, check_quantization_config
from secateur.checkpoint.inspect import inspect
from secateur.checkpoint.shards import read_shard
from secateur.config import make_recipe
from secateur.errors import CheckpointError, ConfigError
from secateur.models.source import ModelFolder, resolve_model
from secateur.pruning import allotment
from secateur.pruning.base import Base
from secateur.pruning.budgets import worth_most
from secateur.pruning.size import Footprint, ways
from secateur.runtime.loading import open_model
from secateur.runtime.native_model import NativeSequence
from tests.calibration.texts import write_folder
from tests.checkpoint.gguf_bases import save_base
from tests.checkpoint.test_export_gguf import matrices
from tests.pruning.tiny_derivation import calibration, contents, derive_tiny, interrupt, shards
from tests.runtime.native_models import native, reference_logits, sub_model, tokens
from tests.runtime.test_small_embedding import near
from tests.tiny import save_tiny

MIXED = {"values": "nl4", "sparsity": 0.0, "eight_bits": 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("eight") / "base", "qwen2")


@pytest.fixture(scope="module")
def mixed(base):
    derive_tiny(base, base.parent / "mixed", method="admm", **MIXED)
    return base.parent / "mixed"


def config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def floats(folder, stored):
    return {name: one for path in folder.glob("*.safetensors") for name, one in read_shard(path, stored).items()}


def test_those_that_are_chosen_have_eight_bits_and_all_others_four(base, tmp_path):
    derive_tiny(base, tmp_path / "out", **MIXED)
    said = config(tmp_path / "out")
    stored = check_quantization_config(said)
    assert said["version"] == 4
    assert 0 < len(stored.eight_bits) < len(stored.unmasked) == len(stored.pruned.shapes)
    found = floats(tmp_path / "out", stored)
    parent = AutoModelForCausalLM.from_pretrained(base).state_dict()
    errors = {name: ((found[name] - parent[name]).norm() / parent[name].norm()).item() for name in stored.pruned.shapes}
    assert max(errors[name] for name in stored.eight_bits) < 0.02
    assert min(errors[name] for name in stored.unmasked - stored.eight_bits) > 0.05


def test_the_parts_that_lose_most_are_chosen(base, mixed, tmp_path, monkeypatch):
    """What is left of the loss is less than with others, and less than with four bits everywhere."""
    options = {**MIXED, "method": "admm"}
    derive_tiny(base, tmp_path / "four", **{**options, "eight_bits": None})
    monkeypatch.setattr(
        allotment, "worth_most", lambda lost, *rest: worth_most({k: -v for k, v in lost.items()}, *rest)
    )
    derive_tiny(base, tmp_path / "worst", **options)
    token_ids = torch.from_numpy(calibration().token_ids)
    wanted, *found = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)(token_ids).logits.log_softmax(-1)
        for one in (base, tmp_path / "four", tmp_path / "worst", mixed)
    )
    four, worst, best = ((wanted.exp() * (wanted - one)).sum(-1).mean().item() for one in found)
    assert best < 0.5 * worst < 0.5 * four


def test_all_readers_compute_the_same(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    text = write_folder(tmp_path / "text", [f"{number}.py" for number in range(12)])
    folder, ids = sub_model(base, text, tmp_path / "sub", **MIXED), tokens(40)
    assert config(folder)["eight_bits"]
    expected = reference_logits(folder, ids)
    model = native(folder).model
    assert near(model.forward(ids, [NativeSequence(model, 40)] * 40, [True] * 40), expected)
    eight_bits = set(config(folder)["eight_bits"])
    kinds = {one.name: one.struct.kind for one, _ in model.products if one.name.startswith("model.layers.")}
    eight, four = (({kinds[name] for name in names}) for names in (eight_bits, kinds.keys() - eight_bits))
    assert (len(eight), len(four), eight & four) == (1, 1, set())
    packed = open_model(resolve_model(str(folder)), packed=True)
    with torch.inference_mode():
        found = packed(torch.tensor([ids])).logits[0].float().numpy()
    assert near(found, expected)
    export(folder, output=tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(torch.bfloat16).float()
    for (name, one), (_, other) in zip(dense.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_file_for_llama_cpp_has_both(tmp_path):
    derive_tiny(save_base(tmp_path / "base", "qwen2"), tmp_path / "sub", **{**MIXED, "values": "int4"})
    found = matrices(export(tmp_path / "sub", output=tmp_path / "sub.gguf", format="gguf"))
    kinds = {kind for name, (kind, _) in found.items() if name.startswith("blk.")}
    assert kinds == {"Q4_0", "Q8_0"}


def test_it_is_told_how_many_there_are(mixed):
    told = inspect(mixed)
    stored = told.stored
    assert told.to_dict()["eight_bits"] == pytest.approx(stored.share_in_eight_bits(), abs=1e-6)
    entries = {name: rows * columns for name, (rows, columns) in stored.pruned.shapes.items()}
    share = sum(entries[name] for name in stored.eight_bits) / sum(entries.values())
    assert f"nl4 in groups of 64, {share:.1%} in eight bits" in told.describe()
    assert 0.3 < share <= 0.5
    assert f"| values | nl4, groups of 64, {share:.1%} in eight bits |" in (mixed / "README.md").read_text()


def test_an_interrupted_derivation_goes_on_with_the_same(base, mixed, tmp_path, monkeypatch):
    partial = interrupt(base, tmp_path / "out", method="admm", **MIXED)
    assert set(json.loads((partial / BUDGET).read_text()).values()) == {4, 8}
    monkeypatch.setattr("secateur.pruning.allotment.measure_divergence", None)  # it is not measured again
    derive_tiny(base, tmp_path / "out", method="admm", resume=True, **MIXED)
    assert contents(tmp_path / "out") == contents(mixed)


@pytest.mark.parametrize("damage", ["{}", "five"])
def test_a_damaged_choice_is_made_again(base, mixed, tmp_path, damage):
    path = interrupt(base, tmp_path / "out", method="admm", **MIXED) / BUDGET
    path.write_text({"five": path.read_text().replace("8", "5", 1)}.get(damage, damage))
    derive_tiny(base, tmp_path / "out", method="admm", resume=True, **MIXED)
    assert shards(tmp_path / "out") == shards(mixed)


def test_recovery_keeps_the_bits(base, tmp_path):
    derive_tiny(base, tmp_path / "out", recovery=calibration(samples=2, seed=1), **MIXED)
    stored = check_quantization_config(config(tmp_path / "out"))
    assert stored.eight_bits
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    levels = {name: len(found[name][0, :64].unique()) for name in stored.unmasked}
    assert max(levels[name] for name in stored.unmasked - stored.eight_bits) <= 16
    assert min(levels[name] for name in stored.eight_bits) > 16


@pytest.mark.parametrize(
    "options",
    [
        {"values": "nl4"},
        {"values": "nl4", "sparsity": 0.5},
        {"values": "int8", "sparsity": 0.0},
        {"sparsity": 0.0},
        {"values": "nl4", "target_size": "3MB"},
        {"values": "nl4", "keep_quality": 0.9},
    ],
)
def test_it_is_refused_where_it_means_nothing(options):
    with pytest.raises(ConfigError, match=r"option 'eight_bits' cannot be 0.5: eight bits are for some weights"):
        make_recipe({"for": "python", "eight_bits": 0.5, **options})


@pytest.mark.parametrize(
    "more", [{"target_size": "300MB"}, {"keep_quality": 0.9}, {"sparsity": 0.5}, {"values": "int8"}]
)
def test_over_a_saved_recipe_another_answer_has_a_share_of_its_own(more, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("for: python\nsparsity: 0.0\nvalues: nl4\neight_bits: 0.37\n")
    assert make_recipe({}, file).eight_bits == 0.37
    found = make_recipe(more, file)
    assert found.eight_bits == 0
    assert "eight_bits" not in found.model_fields_set


def test_over_a_saved_recipe_that_has_none_there_are_none(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("for: python\nsparsity: 0.0\nvalues: nl4\neight_bits: 0.0\n")
    assert "eight_bits" in make_recipe({"target_size": "3MB"}, file).model_fields_set


@pytest.mark.parametrize("more", [{"values": "int4"}, {"sparsity": 0.0}, {"seed": 3}])
def test_over_a_saved_recipe_the_same_answer_keeps_its_share(more, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("for: python\nsparsity: 0.0\nvalues: nl4\neight_bits: 0.37\n")
    assert make_recipe(more, file).eight_bits == 0.37


def test_a_share_too_small_for_any_weight_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"0.10% in eight bits is less than any weight"):
        derive_tiny(base, tmp_path / "out", **{**MIXED, "eight_bits": 0.001})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [-0.1, 1.0, 7])
def test_a_share_is_a_share(share):
    with pytest.raises(ConfigError, match="option 'eight_bits' cannot be"):
        make_recipe({"for": "python", "values": "nl4", "sparsity": 0.0, "eight_bits": share})


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_a_size_is_filled(base, tmp_path, share):
    opened = Base.open(ModelFolder(base, "tiny"))
    footprint = Footprint.of(opened)
    fixed = {"for": "python", "values": "nl4", "group_size": 32, "embedding_values": "int8"}
    four = make_recipe({**fixed, "sparsity": 0.0})
    target = footprint.folder(four) + int(share * footprint.eight_bits(four))
    (found,) = ways(Footprint.of(opened), make_recipe({**fixed, "target_size": target}))
    assert (found.sparsity, found.eight_bits) == (0.0, pytest.approx(share, abs=2e-4))
    del fixed["for"]
    done = derive_tiny(base, tmp_path / "out", method="admm", target_size=target, **fixed)
    assert done.manifest["recipe"]["eight_bits"] == found.eight_bits
    taken = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert taken <= target
    # What is left is less than one weight, the guess of what a folder holds beside tensors apart.
    plain = derive_tiny(base, tmp_path / "plain", **fixed, sparsity=0.0)
    largest = max(rows * columns for rows, columns in opened.shapes().values())
    more = taken - sum(path.stat().st_size for path in plain.path.iterdir())
    assert more > share * footprint.eight_bits(four) - largest


def test_none_stays_none_beside_a_size(base):
    opened, fixed = Base.open(ModelFolder(base, "tiny")), {"for": "python", "values": "nl4", "eight_bits": 0.0}
    found = ways(Footprint.of(opened), make_recipe({**fixed, "target_size": 10**9}))
    assert {(one.sparsity, one.eight_bits) for one in found} == {(0.0, 0.0)}


def test_where_eight_bits_are_enough_for_all_they_are_taken(base, tmp_path):
    footprint = Footprint.of(Base.open(ModelFolder(base, "tiny")))
    target = footprint.folder(make_recipe({"for": "python", "values": "int8", "sparsity": 0.0})) + 1000
    done = derive_tiny(base, tmp_path / "out", method="admm", target_size=target)
    assert (done.manifest["values"], done.manifest["sparsity"]) == ("int8", 0.0)


def test_what_was_begun_without_goes_on_without(base, tmp_path, monkeypatch):
    """As an earlier version has left it, which had no weights in eight bits."""
    footprint = Footprint.of(Base.open(ModelFolder(base, "tiny")))
    four = make_recipe({"for": "python", "values": "nl4", "sparsity": 0.0})
    options = {
        "target_size": footprint.folder(four) + footprint.eight_bits(four) // 2,
        "values": "nl4",
        "group_size": 64,
    }
    options |= {"embedding_values": "int8", "method": "admm"}
    with monkeypatch.context() as before:
        before.setattr("secateur.pruning.size.MOST_EIGHT_BITS", 0.0)
        derive_tiny(base, tmp_path / "out", **options)
        interrupt(base, tmp_path / "half", **options)
    assert derive_tiny(base, tmp_path / "out", **options, resume=True).log == {}
    derive_tiny(base, tmp_path / "half", **options, resume=True)
    assert contents(tmp_path / "half") == contents(tmp_path / "out")
    assert derive_tiny(base, tmp_path / "new", **options).manifest["eight_bits"] > 0.2


@given(
    st.lists(st.tuples(st.floats(0, 1), st.lists(st.integers(1, 1000), min_size=1, max_size=3)), min_size=1),
    st.floats(0, 1),
)
def test_what_is_chosen_fits_and_loses_most(parts, share):
    divergence = {tuple(f"{i}.{j}" for j in range(len(sizes))): lost for i, (lost, sizes) in enumerate(parts)}
    more = {f"{i}.{j}": one for i, (_, sizes) in enumerate(parts) for j, one in enumerate(sizes)}
    chosen = worth_most(divergence, more, share)
    left = share * sum(more.values()) - sum(more[name] for name in chosen)
    assert left >= -1e-6
    assert all(more[name] > left - 1e-6 for name in more.keys() - chosen), "nothing more fits"
    worth = {names: lost / sum(more[name] for name in names) for names, lost in divergence.items()}
    dearest = max(worth, key=worth.__getitem__)
    if sum(more[name] for name in dearest) <= share * sum(more.values()) - 1e-6:
        assert chosen.issuperset(dearest)


def test_what_config_json_may_not_say(mixed):
    said = config(mixed)
    name, other = said["eight_bits"][0], next(iter(said["dense"]["shapes"]))
    for wrong in (
        {"eight_bits": name},
        {"eight_bits": [7]},
        {"eight_bits": [other]},
        {"eight_bits": ["a.weight"]},
        {"unmasked": [one for one in said["unmasked"] if one != name]},
        {"values": "int8"},
        {"version": 3},
    ):
        with pytest.raises(CheckpointError, match="eight_bits"):
            check_quantization_config({**said, **wrong})
    with pytest.raises(CheckpointError, match="version 5"):
        check_quantization_config({**said, "version": 5})
