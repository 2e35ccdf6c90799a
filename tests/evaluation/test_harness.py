import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import ConfigError, CorpusError, ModelError, OutputError, SecateurError, UnknownNameError
from secateur.evaluation.harness import evaluate
from secateur.evaluation.measuring import Measuring
from tests.calibration.texts import word_tokenizer
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "base", "llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def child(base, tmp_path_factory):
    """The base with a part of its weights set to zero."""
    folder = tmp_path_factory.mktemp("models") / "child"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights = {k: v * (v.abs() > 0.1) if "mlp" in k else v for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "sources"
    folder.mkdir()
    for index in range(80):
        lines = [f"def function_{index}_{line}(value):\n    return value * {index + line}\n" for line in range(12)]
        (folder / f"module_{index}.py").write_text("\n".join(lines))
    return folder


def test_results_are_the_same_in_memory_and_on_disk(base, child, text, tmp_path):
    task = f"perplexity:{text}"
    calls = []
    output = tmp_path / "deep" / "out"
    evaluation = evaluate(
        [child], [task], against=base, limit=2000, output=output, progress=lambda *call: calls.append(call)
    )
    assert [file.name for file in output.iterdir()] == ["results.json"]
    assert [file.name for file in output.parent.iterdir()] == ["out"]
    stored = json.loads((output / "results.json").read_text())
    assert stored == evaluation.to_dict() == json.loads(evaluation.to_json())
    assert [model.name for model in evaluation.models] == [str(base), str(child)]
    assert evaluation.against == str(base)
    cell = evaluation.cell(task, str(child))
    parent = evaluation.cell(task, str(base))
    assert parent.comparison is None
    assert cell.comparison.comparable
    assert cell.text_sha256 == parent.text_sha256 != ""
    assert cell.comparison.ratio == pytest.approx(cell.result.perplexity / parent.result.perplexity)
    assert cell.comparison.ratio_low < cell.comparison.ratio < cell.comparison.ratio_high
    assert cell.comparison.ratio != 1
    assert cell.result.n_tokens <= 2000
    assert cell.result.n_documents >= 3
    assert stored["cells"][1]["result"]["n_tokens"] == cell.result.n_tokens
    assert sum(document["tokens"] for document in stored["cells"][1]["result"]["documents"]) == cell.result.n_tokens
    assert stored["settings"]["window_length"] == 256  # all that this model can take
    assert len(stored["corpora"][task][0]["sha256"]) == 64
    assert set(stored["models"][0]["sha256"]) == {"config.json", "model.safetensors"}
    assert calls[-1][0] == f"{child} {task}"
    assert calls[-1][1] == calls[-1][2]


def test_a_model_against_itself_is_exactly_equal_and_measured_once(base, text):
    evaluation = evaluate([str(base), base], [f"perplexity:{text}"] * 2, against=str(base), limit=600)
    assert (len(evaluation.models), len(evaluation.tasks), len(evaluation.cells)) == (1, 1, 1)


def test_other_vocabulary_is_compared_in_bits_per_byte(base, text, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", dtype=torch.float32, vocab_size=400)
    evaluation = evaluate([other], [f"perplexity:{text}"], against=base, limit=1000)
    comparison = evaluation.cell(f"perplexity:{text}", str(other)).comparison
    assert not comparison.comparable
    assert comparison.ratio is None
    assert math.isfinite(comparison.bits_per_byte.value)
    assert "bits/byte" in evaluation.to_table()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": ["perplexty:python"]}, UnknownNameError, "did you mean 'perplexity:python'"),
        ({"tasks": ["perplexity"]}, UnknownNameError, "names no domain"),
        ({"tasks": ["perplexity:"]}, UnknownNameError, "names no domain"),
        ({"tasks": ["perplexity:pyton"]}, UnknownNameError, "did you mean 'python'"),
        ({"tasks": []}, ConfigError, "nothing to evaluate"),
        ({"models": []}, ConfigError, "nothing to evaluate"),
        ({"models": ["/no/such/model"]}, ModelError, "/no/such/model"),
        ({"against": "/no/such/parent"}, ModelError, "/no/such/parent"),
        ({"limit": 1}, ConfigError, "limit is 1"),
        ({"threads": 0}, ConfigError, "threads is 0"),
        ({"device": "teapot"}, ConfigError, "teapot"),
        ({"data": "/no/such/data"}, SecateurError, "/no/such/data"),
    ],
)
def test_mistakes_are_found_before_a_model_is_opened(change, error, message, base, text, tmp_path, monkeypatch):
    monkeypatch.setattr(Measuring, "run", never)
    options = {"models": [base], "tasks": ["perplexity:python"], "output": tmp_path / "out"} | change
    if "data" in change:
        from pathlib import Path

        options["data"] = Path(change["data"])
    with pytest.raises(error, match=message):
        evaluate(options.pop("models"), options.pop("tasks"), **options)
    assert not (tmp_path / "out").exists()


def never(*_):
    raise AssertionError("a model was opened")


def test_an_existing_output_is_kept(base, text, tmp_path, monkeypatch):
    monkeypatch.setattr(Measuring, "run", never)
    with pytest.raises(OutputError, match="exists"):
        evaluate([base], [f"perplexity:{text}"], output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_domain_without_text(base, text, tmp_path, monkeypatch):
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    here, gone = f"perplexity:{text}", "perplexity:math"
    with pytest.raises(CorpusError, match="math"):
        evaluate([base], [here, gone], limit=600)
    evaluation = evaluate([base], [here, gone], limit=600, skip_missing=True, output=tmp_path / "out")
    cell = evaluation.cell(gone, str(base))
    assert cell.result is None
    assert "math" in cell.missing
    assert evaluation.cell(here, str(base)).result is not None
    assert "no text for perplexity:math" in evaluation.to_table()


def test_an_error_on_the_way_leaves_nothing_behind(base, text, tmp_path):
    broken = save_tiny(tmp_path / "broken", "llama")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        evaluate([base, broken], [f"perplexity:{text}"], limit=600, output=tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken"]


@pytest.fixture(scope="module")
def worded(base, tmp_path_factory):
    """The base's weights with another tokenizer, which has words."""
    folder = tmp_path_factory.mktemp("models") / "worded"
    shutil.copytree(base, folder)
    word_tokenizer(["def", "function", "return", "value"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("against", [0, 1, None])
def test_models_with_other_tokenizers_read_the_same_text(base, worded, text, against):
    models, task = [base, worded], f"perplexity:{text}"
    evaluation = evaluate(models, [task], against=None if against is None else models[against], limit=2000)
    plain, other = (evaluation.cell(task, str(one)) for one in models)
    documents = [[document.document for document in cell.result.documents] for cell in (plain, other)]
    assert documents[0] == documents[1]
    assert other.result.n_tokens < plain.result.n_tokens
    # Neither predicts its first token, and those of the other are longer: at most `return ` a window.
    for one, two in zip(plain.result.documents, other.result.documents, strict=True):
        assert 0 <= one.n_bytes - two.n_bytes <= 2 * len("function")
    drawn = (plain, other)[against or 0].result
    assert sum(cell.result.n_tokens for cell in (plain, other) if cell.result is drawn) <= 2000
    if against is not None:
        comparison = (other, plain)[against].comparison
        assert not comparison.comparable
        difference = (other, plain)[against].result.bits_per_byte - (plain, other)[against].result.bits_per_byte
        assert comparison.bits_per_byte.value == pytest.approx(difference)


def test_windows_are_shorter_where_a_tokenizer_needs_more_tokens_than_its_model_takes(base, text, tmp_path):
    """Drawn in words, of which there are fewer than letters."""
    task = f"perplexity:{text}"
    letters, words = tmp_path / "letters", tmp_path / "words"
    shutil.copytree(base, letters)
    shutil.copytree(base, words)
    word_tokenizer(["def", "function", "return", "value"]).save_pretrained(words)
    config = json.loads((letters / "config.json").read_text())
    (letters / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    evaluation = evaluate([words, letters], [task], limit=500)
    assert evaluation.settings["window_length"] < 64
    assert evaluation.cell(task, str(letters)).result.n_tokens > 100
