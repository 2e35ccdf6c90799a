"""Each verb from end to end on a tiny model, as a user types it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.cli import main
from tests.calibration.texts import write_folder
from tests.checkpoint.gguf_bases import save_base
from tests.cli.running import Outcome, run, write_sources
from tests.tiny import tiny_tokenizer

SMALL = ["--samples", "4", "--sequence-length", "64", "--threads", "1"]


def derive(inputs: Path, capsys: pytest.CaptureFixture[str], *more: object, output: object = "out") -> Outcome:
    """Derive from the tiny model and its sources."""
    return run(["derive", inputs / "base", "--for", inputs / "text", *SMALL, *more, "-o", output], capsys)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files whose bytes depend on nothing but the recipe."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "derivation.log.json"}


def test_derive_says_what_it_made(inputs, work, capsys):
    outcome = derive(inputs, capsys)
    assert outcome.code == 0
    assert f"for {inputs / 'text'} in out" in outcome.out
    assert "kept 64,512 of 129,024 prunable weights (sparsity 0.5000)" in outcome.out
    assert outcome.err.startswith("needs about ")
    assert [line.split(" ")[0] for line in outcome.err.splitlines()] == ["needs", "takes"]
    assert sorted(path.name for path in work.iterdir()) == ["cache", "out", "tmp"]
    assert contents(work / "out") == contents(inputs / "child"), "the same options give the same bytes"


def test_derive_as_json_with_a_recipe_and_a_flag_that_wins(inputs, work, capsys):
    (work / "recipe.yaml").write_text(
        f"model: {inputs / 'base'}\nfor: {inputs / 'text'}\nsparsity: 0.25\nmethod: magnitude\nsamples: 2\n"
    )
    arguments = ["derive", "--recipe", "recipe.yaml", "--sparsity", "0.75", "--sequence-length", "32"]
    outcome = run([*arguments, "--seed", "3", "--no-propagate", "-o", "deep/out", "--json"], capsys)
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert result["path"] == "deep/out"
    assert result["sparsity"] == pytest.approx(0.75, abs=0.001)
    assert result["recipe"] == {
        "model": str(inputs / "base"),
        "for": [str(inputs / "text")],
        "sparsity": 0.75,
        "method": "magnitude",
        "budget": "uniform",
        "granularity": "per_output",
        "samples": 2,
        "sequence_length": 32,
        "seed": 3,
        "propagate": False,
        "values": "base",
        "group_size": None,
        "embedding_values": "int8",
        "eight_bits": 0.0,
        "trim_vocabulary": False,
        "vocabulary": None,
        "recover": 0,
        "recover_for": [],
        "correction": 0.5,
        "first_token_weight": 100.0,
    }
    assert result["log"]["seconds"] > 0
    assert json.loads((work / "deep/out/secateur.json").read_text())["recipe"] == result["recipe"]


def test_a_preset_and_recovery(inputs, work, capsys):
    arguments = ["derive", str(inputs / "base"), "--for", str(inputs / "text"), "--samples", "2", "--preset", "best"]
    outcome = run([*arguments, "--sequence-length", "32", "--recover", "100", "-o", "out", "--json"], capsys)
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert (result["recipe"]["method"], result["recipe"]["recover"]) == ("admm", 96)  # whole sequences
    assert (result["recovery"]["samples"], result["recovery"]["sequence_length"]) == (3, 32)
    assert result["recipe"]["recover_for"] == []
    assert run(["inspect", "out", "--verify"], capsys).code == 0
    other = write_folder(work / "other", [f"lines{number}.py" for number in range(8)])
    options = ["--sequence-length", "32", "--recover", "64", "--recover-for", str(other), "-o", "learnt", "--json"]
    outcome = run([*arguments, *options], capsys)
    assert outcome.code == 0, outcome.err
    learnt = json.loads(outcome.out)
    assert learnt["recipe"]["recover_for"] == [str(other)]
    assert [one["domain"] for one in learnt["recovery"]["provenance"]] != [
        one["domain"] for one in learnt["calibration"]["provenance"]
    ]
    outcome = run([*arguments, "--preset", "finest", "-o", "other"], capsys)
    assert outcome.code == 1
    assert "unknown preset 'finest': known are fast, balanced, best" in outcome.err


def test_a_target_size(inputs, work, capsys):
    arguments = ["derive", str(inputs / "base"), "--for", str(inputs / "text"), "--samples", "2"]
    arguments += ["--sequence-length", "32", "-o", "out", "--target-size"]
    outcome = run([*arguments, "1B"], capsys)
    assert outcome.code == 1
    assert "a target size of 0 MB cannot be reached: with nl4, embedding nl4, and 90% removed" in outcome.err
    outcome = run([*arguments, "1 GB", "--values", "int8", "--json"], capsys)
    assert outcome.code == 0
    assert "for 1,000 MB: values int8 in groups of 128, embedding int8, sparsity 0.0" in outcome.err
    assert json.loads(outcome.out)["recipe"]["sparsity"] == 0.0
    outcome = run([*arguments, "1 GB", "--sparsity", "0.5"], capsys)
    assert outcome.code == 1
    assert "sparsity and target_size decide the same thing" in outcome.err


def test_a_trimmed_vocabulary(inputs, work, capsys):
    arguments = ["derive", str(inputs / "base"), "--for", str(inputs / "text"), "--samples", "2"]
    outcome = run([*arguments, "--sequence-length", "32", "--trim-vocabulary", "-o", "out", "--json"], capsys)
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert result["recipe"]["trim_vocabulary"] is True
    assert 0 < result["shortlist"]["tokens"] < result["shortlist"]["vocabulary"]
    outcome = run(["inspect", "out"], capsys)
    assert f"computes {result['shortlist']['tokens']} of {result['shortlist']['vocabulary']} tokens" in outcome.out
    assert run(["generate", "out", "-p", "a", "--max-new-tokens", "3"], capsys).code == 0


def test_options_change_the_masks(inputs, work, capsys):
    variants = {
        "magnitude": ["--method", "magnitude"],
        "per_layer": ["--granularity", "per_layer"],
        "dense": ["--no-propagate"],
        "seed": ["--seed", "1"],
    }
    shards = {"default": (inputs / "child" / "model-00003-of-00004.safetensors").read_bytes()}
    for name, options in variants.items():
        assert derive(inputs, capsys, *options, output=name).code == 0
        shards[name] = (work / name / "model-00003-of-00004.safetensors").read_bytes()
    assert len(set(shards.values())) == len(shards)


def test_a_mixture_of_a_folder_and_a_file(inputs, work, capsys):
    lines = [json.dumps({"text": f"prose number {number} about nothing. " * 12}) for number in range(40)]
    (work / "prose.jsonl").write_text("\n".join(lines))
    outcome = derive(inputs, capsys, "--for", "prose.jsonl=3", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["recipe"]["for"] == [str(inputs / "text"), "prose.jsonl=3"]


def test_an_interrupted_derivation_goes_on_to_the_same_bytes(inputs, work, capsys, monkeypatch):
    from secateur.pruning import loop

    original, written = loop.write_block_shard, []

    def interrupt(path: Path, *arguments: object) -> None:
        if written:
            raise KeyboardInterrupt
        original(path, *arguments)
        written.append(path.name)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_block_shard", interrupt)
        outcome = derive(inputs, capsys)
    assert outcome.code == 130
    assert outcome.out == ""
    assert outcome.err.splitlines()[-1].startswith("secateur: interrupted")
    assert "--resume" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (work / "out").exists()
    assert (work / "out.partial" / written[0]).is_file()

    kept = (work / "out.partial" / written[0]).stat().st_mtime_ns
    assert derive(inputs, capsys).code == 1, "without --resume it is refused"
    assert derive(inputs, capsys, "--resume").code == 0
    assert contents(work / "out") == contents(inputs / "child")
    assert (work / "out" / written[0]).stat().st_mtime_ns == kept, "the finished block was not made again"
    assert not (work / "out.partial").exists()


def test_resume_with_nothing_to_resume_and_with_nothing_left_to_do(inputs, work, capsys):
    assert derive(inputs, capsys, "--resume").code == 0
    before = contents(work / "out")
    outcome = derive(inputs, capsys, "--resume")
    assert outcome.code == 0
    assert "finished already" in outcome.out
    assert contents(work / "out") == before == contents(inputs / "child")


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_integers_from_end_to_end(inputs, work, capsys, values):
    # Wanda: with a Gram matrix codes make up for what was removed too, and differ by more than rounding.
    assert derive(inputs, capsys, "--method", "wanda", output="exact").code == 0
    outcome = derive(inputs, capsys, "--method", "wanda", "--values", values, "--group-size", "32", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["recipe"]["group_size"] == 32
    assert json.loads(run(["inspect", "out", "--verify", "--json"], capsys).out)["values"] == values
    assert f"{values} in groups of 32, embedding and head int8" in run(["inspect", "out"], capsys).out
    task = f"perplexity:{inputs / 'text'}"
    outcome = run(["evaluate", "out", "exact", "--task", task, "--limit", "300", "--json"], capsys)
    assert outcome.code == 0
    perplexity = [cell["result"]["perplexity"] for cell in json.loads(outcome.out)["cells"]]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=0.02 if values == "int8" else 0.3)
    assert run(["generate", "out", "-p", "def f", "--max-new-tokens", "3"], capsys).code == 0
    assert run(["export", "out", "-o", "dense"], capsys).code == 0
    assert run(["generate", "dense", "-p", "def f", "--max-new-tokens", "3"], capsys).code == 0


def test_inspect(inputs, work, capsys):
    outcome = run(["inspect", inputs / "child"], capsys)
    assert (outcome.code, outcome.err) == (0, "")
    for text in (f"sub-model of   {inputs / 'base'}", "sparsity 0.5000", "admm, per_output", "4 x 64 tokens", "total"):
        assert text in outcome.out
    assert "hashes not compared" in outcome.out
    assert outcome.out.count(" 0.5000\n") == 21, "a line for each of 7 weights in 3 blocks"


def test_inspect_verifies_and_speaks_json(inputs, work, capsys):
    assert "all match their SHA-256" in run(["inspect", inputs / "child", "--verify"], capsys).out
    outcome = run(["inspect", inputs / "child", "--verify", "--json"], capsys)
    result = json.loads(outcome.out)
    assert result["verified"] is True
    assert result["bytes"] == sum(result["bytes_by_part"].values())
    assert result["bytes"] == sum(path.stat().st_size for path in (inputs / "child").iterdir())
    assert result["kept_weights"] == 64512


def test_evaluate_against_the_parent(inputs, work, capsys):
    task = f"perplexity:{inputs / 'text'}"
    arguments = ["evaluate", inputs / "child", "--task", task, "--against", inputs / "base", "--limit", "300"]
    outcome = run([*arguments, "-o", "results", "--threads", "1", "--json"], capsys)
    assert (outcome.code, outcome.err) == (0, "")
    stored = json.loads((work / "results" / "results.json").read_text())
    assert stored == json.loads(outcome.out)
    assert [path.name for path in (work / "results").iterdir()] == ["results.json"]
    assert [model["name"] for model in stored["models"]] == [str(inputs / "base"), str(inputs / "child")]
    parent, child = stored["cells"]
    assert parent["comparison"] is None
    ratio = child["result"]["perplexity"] / parent["result"]["perplexity"]
    assert child["comparison"]["ratio"] == pytest.approx(ratio)
    assert ratio != 1

    table = run(arguments, capsys)
    assert (table.code, table.err) == (0, "")
    assert str(inputs / "child") in table.out
    assert f"{child['result']['perplexity']:.4g}" in table.out


OPEN = """
import sys
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
assert not [name for name in sys.modules if name.split(".")[0] == "secateur"]
with torch.inference_mode():
    torch.save(model(torch.arange(1, 40)[None]).logits, sys.argv[2])
"""


def test_an_exported_folder_opens_without_secateur(inputs, work, capsys):
    assert derive(inputs, capsys, "--method", "wanda", output="sub").code == 0  # which keeps weights to the bit
    outcome = run(["export", "sub", "-o", "dense", "--json"], capsys)
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out) == {"path": "dense"}
    assert "quantization_config" not in json.loads((work / "dense" / "config.json").read_text())
    subprocess.run([sys.executable, "-c", OPEN, work / "dense", work / "logits.pt"], check=True, timeout=120)
    with torch.inference_mode():
        expected = secateur.load("sub", engine="torch").model(torch.arange(1, 40)[None]).logits
    # Exact: the same weights, the same library, one process apart; threads may add up in another order.
    torch.testing.assert_close(torch.load(work / "logits.pt"), expected, rtol=0.02, atol=0.02)
    dense = {name: t for shard in (work / "dense").glob("*.safetensors") for name, t in load_file(shard).items()}
    base = load_file(inputs / "base" / "model.safetensors")
    assert dense.keys() == base.keys()
    for name, weight in base.items():
        kept = dense[name] != 0
        assert torch.equal(dense[name][kept], weight[kept])
        if "proj" in name:
            assert kept.float().mean().item() == pytest.approx(0.5)
    shutil.rmtree(work / "dense")


def test_an_exported_gguf_is_a_model_like_any_other(inputs, work, capsys):
    base = save_base(work / "base", "llama")
    small = ["--for", inputs / "text", *SMALL]
    assert run(["derive", base, *small, "-o", "sub"], capsys).code == 0
    outcome = run(["export", "sub", "--format", "gguf", "--type", "q8_0", "-o", "sub.gguf", "--json"], capsys)
    assert (outcome.code, outcome.err, json.loads(outcome.out)) == (0, "", {"path": "sub.gguf"})
    assert (work / "sub.gguf").stat().st_size < (base / "model.safetensors").stat().st_size
    assert run(["generate", "sub.gguf", "-p", "def f", "--max-new-tokens", "4", "--threads", "1"], capsys).code == 0


def test_generate_streams_text_and_speaks_json(inputs, work, capsys):
    arguments = ["generate", inputs / "child", "-p", "def f", "--max-new-tokens", "12", "--threads", "1"]
    text, as_json = run(arguments, capsys), run([*arguments, "--json"], capsys)
    assert (text.code, text.err, as_json.code, as_json.err) == (0, "", 0, "")
    answer = json.loads(as_json.out)
    assert answer["prompt"] == "def f"
    assert answer["text"]
    assert text.out == answer["text"] + "\n"
    assert secateur.load(inputs / "child").generate("def f", max_new_tokens=12) == answer["text"]


def test_generate_fills_in_the_middle(inputs, work, capsys):
    shutil.copytree(inputs / "child", "coder")
    specials = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    tiny_tokenizer(more_specials=specials).save_pretrained("coder")
    arguments = ["generate", "coder", "-p", "def f", "--suffix", "return", "--max-new-tokens", "12", "--threads", "1"]
    answer = json.loads(run([*arguments, "--json"], capsys).out)
    expected = secateur.load("coder").generate("<fim_prefix>def f<fim_suffix>return<fim_middle>", max_new_tokens=12)
    assert answer == {"prompt": "def f", "suffix": "return", "text": expected}
    assert run(arguments, capsys).out == expected + "\n"


def test_generate_draws_with_a_seed(inputs, work, capsys):
    arguments = ["generate", inputs / "base", "-p", "x", "--max-new-tokens", "16", "--temperature", "2"]
    drawn = [run([*arguments, "--seed", seed], capsys).out for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("domains", ["python", "java", "cpp", "javascript", "code", "general", "PATH"]),
        ("methods", ["wanda", "magnitude"]),
        ("budgets", ["uniform"]),
        ("tasks", ["perplexity:python", "perplexity:code"]),
    ],
)
def test_list(kind, names, work, capsys):
    outcome = run(["list", kind, "--json"], capsys)
    rows = json.loads(outcome.out)
    assert {row["name"] for row in rows} >= set(names)
    table = run(["list", kind], capsys).out.splitlines()
    assert len(table) == len(rows) + 1
    assert [line.split()[0] for line in table[1:]] == [row["name"] for row in rows]


def test_list_corpora_knows_the_data_folder(work, capsys):
    folder = write_sources(work / "data" / "corpora", files=1)
    for split in ("train", "held_out"):
        (folder / f"math.{split}.jsonl.gz").write_bytes(b"")
    rows = json.loads(run(["list", "corpora", "--data", "data", "--json"], capsys).out)
    math = [row for row in rows if row["domain"] == "math"]
    assert [row["available"] for row in math] == ["yes"]
    rows = json.loads(run(["list", "corpora", "--json"], capsys).out)
    assert [row["available"] for row in rows if row["domain"] == "math"] == ["no"]


def test_version(work, capsys):
    assert run(["--version"], capsys).out == f"secateur {secateur.__version__}\n"


@pytest.mark.parametrize("place", [0, -1])
def test_debug_shows_where_an_error_comes_from(place, work):
    arguments = ["inspect", "gone"]
    arguments.insert(place % (len(arguments) + 1), "--debug")
    with pytest.raises(secateur.errors.CheckpointError, match="gone"):
        main(arguments)


def test_progress_is_silent_without_a_terminal(inputs, work):
    """And nothing else is written beside the result, in a process of its own."""
    program = Path(sys.executable).with_name("secateur")
    arguments = ["derive", str(inputs / "base"), "--for", str(inputs / "text"), *SMALL, "-o", "out", "--json"]
    ended = subprocess.run([program, *arguments], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(ended.stdout)["path"] == "out"
    assert [line.split(" ")[0] for line in ended.stderr.splitlines()] == ["needs", "takes"]
    assert "\r" not in ended.stderr
    assert contents(work / "out") == contents(inputs / "child"), "threads given, another process gives the same bytes"
