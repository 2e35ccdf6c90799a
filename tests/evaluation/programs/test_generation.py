import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import secateur
from secateur.errors import ConfigError
from secateur.evaluation.harness import evaluate
from secateur.evaluation.journal import Journal
from secateur.evaluation.programs.benchmarks import humaneval
from secateur.evaluation.programs.generation import Asking, generate
from secateur.evaluation.programs.program import Verdict
from secateur.evaluation.programs.run import chosen
from secateur.evaluation.programs.scoring import Scorer
from tests.evaluation.programs.mini import RECORDS, save_mini
from tests.tiny import save_tiny

TEMPLATE = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<assistant>"
PROBLEMS = list(humaneval(RECORDS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "base", "llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def model(folder):
    return secateur.load(folder)


def answers(model, path, asking, progress=lambda *_: None):
    with Journal(path) as journal:
        generate(model, PROBLEMS, asking, journal, progress)
        return journal.records


def test_each_problem_is_answered_as_often_as_was_asked(model, tmp_path):
    asking = Asking("plain", samples=3, temperature=1.0, max_new_tokens=8, batch=4)
    found = answers(model, tmp_path / "a.jsonl", asking)
    assert [(one["task_id"], one["sample"]) for one in found] == [(p.task_id, n) for p in PROBLEMS for n in range(3)]
    assert len({one["completion"] for one in found[:3]}) > 1
    assert found == answers(model, tmp_path / "b.jsonl", asking)
    assert found != answers(model, tmp_path / "c.jsonl", Asking("plain", 3, 1.0, 1, 8, 4))


def test_greedy_answers_are_those_of_the_model(model, tmp_path):
    found = answers(model, tmp_path / "a.jsonl", Asking("plain", max_new_tokens=8, batch=2))
    stop = (*PROBLEMS[0].stop, "\n```")
    expected = [model.generate(one.prompt, max_new_tokens=8, stop=stop) for one in PROBLEMS]
    assert [one["completion"] for one in found] == expected


@pytest.mark.parametrize("kept", [0, 1, 4, 5])
def test_an_interruption_costs_at_most_a_batch_and_changes_nothing(model, tmp_path, kept):
    asking = Asking("plain", temperature=1.0, max_new_tokens=8, batch=4)
    whole = answers(model, tmp_path / "whole.jsonl", asking)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:7])
    seen = []
    assert answers(model, tmp_path / "cut.jsonl", asking, lambda done, total: seen.append((done, total))) == whole
    assert seen[0] == (kept // 4 * 4, 6)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_chat_model_is_asked_in_its_template(folder, tmp_path, monkeypatch):
    chat = tmp_path / "chat"
    chat.mkdir()
    for file in folder.iterdir():
        (chat / file.name).write_bytes(file.read_bytes())
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    model, given = secateur.load(chat), []
    monkeypatch.setattr(
        type(model), "generate_batch", lambda _self, prompts, **_: given.extend(prompts) or ["x"] * len(prompts)
    )
    assert Asking().chosen(model) == "chat"
    answers(model, tmp_path / "a.jsonl", Asking(max_new_tokens=4))
    problem = PROBLEMS[0]
    assert given[0] == f"<user>{problem.question()}<assistant>```python\n{problem.prompt}"
    assert Asking().chosen(secateur.load(folder)) == "plain"


def test_an_answer_ends_where_the_function_does():
    problem = PROBLEMS[0]
    assert problem.cut("    return 1\n\ndef other():\n") == "    return 1\n"
    assert problem.cut("    return 1\n```\nThat is all.") == "    return 1"
    assert problem.cut("    return 1\n") == "    return 1\n"
    assert problem.cut("```\nThat is all.") == ""


def test_fewer_problems_are_those_of_the_same_numbers():
    problems = {one.task_id: one for one in PROBLEMS}
    some = chosen(problems, 3)
    names = {one.task_id: f"x_{one.task_id.partition('/')[2]}_y" for one in PROBLEMS}
    renamed = {names[one.task_id]: replace(one, task_id=names[one.task_id]) for one in reversed(PROBLEMS)}
    assert list(some) == sorted(some)
    assert list(chosen(problems, 2)) == [one for one in some if one in chosen(problems, 2)]
    assert list(chosen(problems, None)) == list(problems)
    assert list(chosen(renamed, 3)) == [names[one] for one in some], "those of a translation have the same numbers"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "talk"}, "prompt_style is 'talk'"),
        ({"samples": 0}, "answers is 0"),
        ({"batch": 65}, "batch 65"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Asking(**options)


def test_models_are_compared_problem_by_problem(folder, tmp_path, monkeypatch):
    """A parent that solves all and a child that solves every other one; what models write here is never right."""
    data = save_mini(tmp_path / "data")
    child = tmp_path / "child"
    child.mkdir()
    for file in folder.iterdir():
        (child / file.name).write_bytes(file.read_bytes())
    asked: list[int] = []

    def verdict(_self, sample):
        asked.append(1)
        parent, number = len(asked) <= 6, int(sample.task_id.partition("/")[2])
        return Verdict("passed" if parent or number % 2 else "wrong", "", 0.0)

    monkeypatch.setattr(Scorer, "_run", verdict)
    found = evaluate(
        [child],
        ["humaneval"],
        against=folder,
        data=data,
        output=tmp_path / "out",
        run_generated_code=True,
        asking=Asking(max_new_tokens=4),
        workers=1,
    )
    parent, ours = found.cell("humaneval", str(folder)), found.cell("humaneval", str(child))
    assert (parent.result.main.value, ours.result.main.value) == (1.0, 0.5)
    comparison = ours.comparison
    assert comparison.paired.difference.value == -0.5
    assert comparison.p_corrected == comparison.paired.p_value == 0.25
    assert "100.0% [" in found.to_table()
    assert "-50.0 [" in found.to_table()
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored == found.to_dict()
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert {"base/humaneval/samples.jsonl", "child/humaneval/results.jsonl", "results.json"} <= names


def test_an_interrupted_evaluation_goes_on_to_the_same_files(folder, tmp_path):
    data = save_mini(tmp_path / "data")
    options = {"data": data, "run_generated_code": True, "asking": Asking(max_new_tokens=4, batch=2), "workers": 1}
    evaluate([folder], ["humaneval"], output=tmp_path / "whole", **options)
    for stage, at in (("answers", 2), ("runs", 3)):

        def stop(what, done, _total, stage=stage, at=at):
            if stage in what and done == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate([folder], ["humaneval"], output=tmp_path / "cut", **options, progress=stop)
    evaluate([folder], ["humaneval"], output=tmp_path / "cut", **options)
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()


KILLER = """
import os, signal, sys
from pathlib import Path
from secateur.evaluation.harness import evaluate
from secateur.evaluation.journal import Journal
from secateur.evaluation.programs.generation import Asking

folder, data, place = map(Path, sys.argv[1:])
real = Journal.append
for moment in ("whole", *range(1, 10)):
    child = os.fork()
    if child == 0:
        calls = []
        def append(self, records):
            calls.append(1)
            if len(calls) == moment:
                self._file.write(b'{"task_id": "Human')  # what a kill may leave of a line
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, records)
        Journal.append = append
        asking = Asking(max_new_tokens=4, batch=2)
        options = {"data": data, "run_generated_code": True, "asking": asking, "workers": 1, "threads": 1}
        evaluate([folder], ["humaneval"], output=place / str(moment), **options)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert (moment == "whole") != killed, (moment, status)
"""


def test_a_killed_evaluation_goes_on_to_the_same_files(folder, tmp_path, sandbox):
    """Killed by SIGKILL before each of three batches of answers and six runs; the next one is a process of its own."""
    data = save_mini(tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(folder), str(data), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    options = {"data": data, "run_generated_code": True, "asking": Asking(max_new_tokens=4, batch=2), "workers": 1}
    for moment in map(str, range(1, 10)):
        assert not (tmp_path / moment).exists()
        evaluate([folder], ["humaneval"], output=tmp_path / moment, threads=1, **options)
        for path in whole.rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (tmp_path / moment / path.relative_to(whole)).read_bytes(), (moment, path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "generation_config.json"])
def test_another_template_does_not_go_on_with_an_interrupted_evaluation(folder, tmp_path, file):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    options = {"data": save_mini(tmp_path / "data"), "run_generated_code": True, "asking": Asking(max_new_tokens=4)}

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate([copy], ["humaneval"], output=tmp_path / "out", **options, progress=stop)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**content, "something": 1}))
    with pytest.raises(ConfigError, match="asked_with"):
        evaluate([copy], ["humaneval"], output=tmp_path / "out", **options)


def test_two_seeds_draw_answers_of_their_own(model, tmp_path):
    one, other = (answers(model, tmp_path / f"{seed}.jsonl", Asking("plain", 6, 1.0, seed, 8, 36)) for seed in (0, 1))
    drawn = [{(line["task_id"], line["completion"]) for line in lines} for lines in (one, other)]
    assert len(drawn[0] & drawn[1]) < len(drawn[0]) / 4


def test_a_folder_for_answers_is_needed(folder):
    with pytest.raises(ConfigError, match="-o"):
        evaluate([folder], ["humaneval"], run_generated_code=True)
