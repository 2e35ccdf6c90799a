"""Derivations with a trimmed head: what a reader sees, what is recorded, going on after an interruption."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur.calibration.calibrate import calibrate
from secateur.calibration.shortlist import choose_tokens
from secateur.checkpoint.export import export
from secateur.checkpoint.format import MANIFEST, read_json
from secateur.checkpoint.inspect import inspect
from secateur.errors import ConfigError, ModelError, OutputError
from secateur.models.source import load_tokenizer
from secateur.pruning.derive import derive
from tests.calibration.texts import write_folder
from tests.pruning.tiny_derivation import calibration, contents, derive_tiny, interrupt
from tests.tiny import EOS, VOCABULARY, save_tiny

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAMILIES = {"qwen2": EMBEDDING, "llama": HEAD}  # tied and untied


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("text"), [f"{i}.py" for i in range(20)])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("trim")
    return {family: save_tiny(root / family, family) for family in FAMILIES}


def trim(base, text, output, **options):
    calibration = calibrate(str(text), load_tokenizer(base), samples=4, sequence_length=32)
    return derive_tiny(base, output, **{"calibration": calibration, "trim_vocabulary": True, **options})


def tensors(folder):
    return {name: one for path in sorted(folder.glob("*.safetensors")) for name, one in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trimmed_sub_model_learns_as_one_that_is_not(bases, text, tmp_path, family):
    """From all the tokens that its parent knows."""
    learning = {"values": "int8", "recovery": calibration(samples=6, seed=7)}
    for trimmed in (True, False):
        trim(bases[family], text, tmp_path / str(trimmed), trim_vocabulary=trimmed, **learning)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("True", "False"))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("values", ["base", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trimmed_sub_model_has_the_weights_of_one_that_is_not(bases, text, tmp_path, family, values):
    done = trim(bases[family], text, tmp_path / "trimmed", values=values)
    trim(bases[family], text, tmp_path / "plain", values=values, trim_vocabulary=False)
    trimmed, plain = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("trimmed", "plain")
    )
    assert trimmed.keys() == plain.keys()
    assert all(torch.equal(trimmed[name], plain[name]) for name in plain)
    for name in ("trimmed", "plain"):
        export(tmp_path / name, output=tmp_path / f"{name}-dense")
    first, second = (tensors(tmp_path / f"{name}-dense") for name in ("trimmed", "plain"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in second)

    config = read_json(tmp_path / "trimmed" / "config.json")["quantization_config"]
    count = done.manifest["shortlist"]["tokens"]
    assert config["shortlist"] == {"weight": FAMILIES[family], "tokens": count}
    assert 256 < count < VOCABULARY
    last = load_file(sorted((tmp_path / "trimmed").glob("*.safetensors"))[-1])
    assert last[f"{FAMILIES[family]}.shortlist"].max() < 300  # nothing has the rows behind the tokenizer's
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "trimmed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_what_is_recorded(bases, text, tmp_path):
    done = trim(bases["qwen2"], text, tmp_path / "out", values="int8")
    assert done.manifest["recipe"]["trim_vocabulary"] is True
    said = done.manifest["shortlist"]
    chosen = choose_tokens(((str(text), 1.0),), load_tokenizer(bases["qwen2"]), VOCABULARY, always=[EOS])
    assert said == chosen.to_dict()
    found = inspect(tmp_path / "out", verify=True)
    line = f"head           computes {said['tokens']} of {VOCABULARY} tokens (100.00% of held-out {text})"
    assert line in found.describe()
    assert found.to_dict()["shortlist"] == said
    assert found.total_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert f"computes {said['tokens']} of {VOCABULARY} tokens" in (tmp_path / "out" / "README.md").read_text()
    plain = trim(bases["qwen2"], text, tmp_path / "plain", trim_vocabulary=False)
    assert "shortlist" not in plain.manifest
    assert "| head |" not in (tmp_path / "plain" / "README.md").read_text()


def test_tokens_that_end_a_text_are_kept_whatever_the_tokenizer_says(bases, text, tmp_path):
    base = save_tiny(tmp_path / "base", "qwen2", eos_token_id=300)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 310], "pad_token_id": None}))
    trim(base, text, tmp_path / "out")
    last = load_file(sorted((tmp_path / "out").glob("*.safetensors"))[-1])
    assert {EOS, 300, 310} <= set(last[f"{EMBEDDING}.shortlist"].tolist())


@pytest.mark.parametrize("values", ["base", "int4"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(bases, text, tmp_path, values):
    calibration = calibrate(str(text), load_tokenizer(bases["qwen2"]), samples=4, sequence_length=32)
    options = {"calibration": calibration, "trim_vocabulary": True, "values": values}
    derive_tiny(bases["qwen2"], tmp_path / "whole", **options)
    interrupt(bases["qwen2"], tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="trim_vocabulary"):
        derive_tiny(bases["qwen2"], tmp_path / "out", **{**options, "trim_vocabulary": False}, resume=True)
    derive_tiny(bases["qwen2"], tmp_path / "out", **options, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert derive_tiny(bases["qwen2"], tmp_path / "out", **options, resume=True).log == {}
    with pytest.raises(OutputError, match="trim_vocabulary"):
        derive_tiny(bases["qwen2"], tmp_path / "out", **{**options, "trim_vocabulary": False}, resume=True)


def test_a_manifest_from_before_the_option_is_one_without(bases, text, tmp_path):
    trim(bases["qwen2"], text, tmp_path / "out", trim_vocabulary=False)
    manifest = read_json(tmp_path / "out" / MANIFEST)
    del manifest["recipe"]["trim_vocabulary"]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    assert trim(bases["qwen2"], text, tmp_path / "out", trim_vocabulary=False, resume=True).log == {}


def test_other_text_than_that_of_the_calibration_is_refused(bases, text, tmp_path):
    other = write_folder(tmp_path / "text", [f"{i}.py" for i in range(20)])
    calibration = calibrate(str(other), load_tokenizer(bases["qwen2"]), samples=4, sequence_length=32)
    write_folder(other, [f"more{i}.py" for i in range(20)])
    with pytest.raises(ConfigError, match="not that of the calibration set"):
        derive(bases["qwen2"], calibration, output=tmp_path / "out", trim_vocabulary=True)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_cannot_be_trimmed(bases, text, tmp_path):
    base = save_tiny(tmp_path / "base", "qwen2")
    calibration = calibrate(str(text), load_tokenizer(base), samples=4, sequence_length=32)
    for path in base.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        derive(base, calibration, output=tmp_path / "out", trim_vocabulary=True)
