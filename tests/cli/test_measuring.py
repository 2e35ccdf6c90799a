"""Rules, cards and benchmarks of programs, as a user types them."""

import json
import shutil

import pytest

from tests.cli.running import run, unchanged
from tests.evaluation.programs.conftest import sandbox  # noqa: F401 - a fixture
from tests.evaluation.programs.mini import RECORDS, save_mini, save_samples


@pytest.fixture
def asked(inputs, work):
    """What is the same in every evaluation here: the child in a folder of its own, beside its parent."""
    shutil.copytree(inputs / "child", work / "child")
    task = f"perplexity:{inputs / 'text'}"
    return ["evaluate", "child", "--against", inputs / "base", "--task", task, "--limit", "600", "--threads", "1"], task


@pytest.mark.parametrize(("rule", "code"), [(">=0.5", 0), ("<=9", 0), ("<=0.5", 1), (">=9", 1)])
def test_a_rule_decides_on_the_exit_code(asked, capsys, rule, code):
    arguments, task = asked
    outcome = run([*arguments, "--require", task + rule, "-o", "out"], capsys)
    assert outcome.code == code
    assert "task" in outcome.out.splitlines()[0], "the table is there in any case"
    assert (f"child misses {task}{rule}, it has " in outcome.err) == bool(code)


def test_results_are_kept_when_a_rule_is_missed(asked, work, capsys):
    arguments, task = asked
    assert run([*arguments, "--require", f"{task}>=99", "-o", "out"], capsys).code == 1
    assert json.loads((work / "out" / "results.json").read_text())["cells"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("humaneval>=0.9", "not measured"),
        ("perplexity", "is none"),
        ("{task}>0.9", "is none"),
        ("{task}>=1.2.3", "is none"),
    ],
)
def test_a_rule_that_is_none_is_refused_before_anything_is_measured(asked, work, capsys, rule, message):
    arguments, task = asked
    with unchanged(work):
        outcome = run([*arguments, "--require", rule.replace("{task}", task)], capsys)
    assert outcome.code == 1
    assert message in outcome.err


def test_a_rule_needs_a_parent(inputs, work, capsys):
    task = f"perplexity:{inputs / 'text'}"
    outcome = run(["evaluate", inputs / "child", "--task", task, "--require", f"{task}<=1"], capsys)
    assert outcome.code == 1
    assert "--against" in outcome.err


def test_a_rule_needs_another_model_than_the_parent(inputs, work, capsys):
    task = f"perplexity:{inputs / 'text'}"
    arguments = ["evaluate", inputs / "child", "--against", inputs / "child", "--task", task]
    outcome = run([*arguments, "--require", f"{task}<=1"], capsys)
    assert outcome.code == 1
    assert "is about other models" in outcome.err


def test_the_card_gets_the_figures_once_and_the_folder_stays_whole(asked, work, capsys):
    arguments, task = asked
    before = (work / "child" / "README.md").read_text()
    for _ in range(2):
        outcome = run([*arguments, "--update-card"], capsys)
        assert outcome.code == 0
    card = (work / "child" / "README.md").read_text()
    assert card.startswith(before.rstrip())
    assert card.count("# What was measured") == 1
    row = next(line for line in card.splitlines() if line.startswith(f"| {task} |"))
    assert " x" in row
    assert "| | base | this model |" in card
    assert run(["inspect", "child", "--verify"], capsys).code == 0


def test_a_card_is_not_compared_with_itself(asked, work, capsys):
    _, task = asked
    outcome = run(["evaluate", "child", "--against", "child", "--task", task, "--update-card"], capsys)
    assert outcome.code == 0, outcome.err
    assert "| | this model |" in (work / "child" / "README.md").read_text()


def test_a_card_whose_section_has_no_end_is_left_alone(asked, work, capsys):
    arguments, _ = asked
    card = work / "child" / "README.md"
    card.write_text(card.read_text() + "<!-- evaluation: begin -->\n")
    with unchanged(work / "child"):
        outcome = run([*arguments, "--update-card"], capsys)
    assert outcome.code == 1
    assert "evaluation: end" in outcome.err


@pytest.mark.usefixtures("sandbox")
def test_a_benchmark_from_question_to_table(inputs, work, capsys):
    data = save_mini(work / "data")
    asked = ["evaluate", inputs / "child", "--against", inputs / "base", "--task", "humaneval", "--data", data]
    more = ["--max-new-tokens", "4", "--problems", "3", "--run-generated-code", "-o", "out"]
    refused = run([*asked, *more[:4], "-o", "out"], capsys)
    assert (refused.code, "--run-generated-code" in refused.err) == (1, True)
    outcome = run([*asked, *more], capsys)
    assert outcome.code == 0, outcome.err
    assert "0.0% [0, 56]" in outcome.out
    assert "points more or less than" in outcome.out
    samples = (work / "out" / "child" / "humaneval" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 3
    again = run([*asked, *more], capsys)
    assert (again.code, "exists" in again.err) == (1, True)


@pytest.mark.usefixtures("sandbox")
def test_samples_of_another_tool_are_scored(work, capsys):
    data = save_mini(work / "data")
    solutions = [(number, record["canonical_solution"]) for number, record in enumerate(RECORDS)]
    samples = save_samples(work / "samples.jsonl", [*solutions[:3], (3, "    return None\n")])
    asked = ["score", samples, "--task", "humaneval", "--data", data, "-o", "out"]
    assert "--run-generated-code" in run(asked, capsys).err
    outcome = run([*asked, "--run-generated-code"], capsys)
    assert outcome.code == 0, outcome.err
    assert "humaneval: 4 answers to 4 of 6 problems" in outcome.out
    assert "pass@1: 75.0%" in outcome.out
    assert "1 wrong: a check did not hold" in outcome.out
