import json

import pytest
import torch

import secateur
from secateur.errors import ConfigError
from secateur.evaluation.harness import evaluate
from secateur.evaluation.infilling import Gap, Gaps, gaps, judge, similarity
from secateur.evaluation.journal import Journal
from tests.cli.running import write_sources
from tests.tiny import save_tiny, tiny_tokenizer

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("text") / "sources", files=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose tokenizer has the tokens of fill-in-the-middle."""
    made = save_tiny(
        tmp_path_factory.mktemp("models") / "base", "llama", dtype=torch.float32, max_position_embeddings=4096
    )
    tiny_tokenizer(more_specials=MARKS).save_pretrained(made)
    return made


def test_a_gap_and_what_is_around_it_are_the_file(text):
    some = gaps(str(text), None, 5)
    assert [gap.kind for gap in some] == ["line"] * 5 + ["span"] * 5
    files = {str(path): path.read_text() for path in text.rglob("*") if path.is_file()}
    for gap in some:
        name = gap.name.rpartition(",")[0]
        content = next(content for path, content in files.items() if path.endswith(name))
        assert gap.before + gap.text + gap.after in content
        assert gap.text == gap.text.rstrip()
        assert len(gap.text) <= 200
    for gap in some[:5]:
        assert "\n" not in gap.text
        assert len(gap.text.strip()) == len(gap.text) >= 8
        assert gap.before.rpartition("\n")[2].strip() == ""
        assert gap.after.partition("\n")[0].strip() == ""
    assert gaps(str(text), None, 5) == some
    assert [gap for gap in gaps(str(text), None, 3) if gap.kind == "line"] == some[:3]


def test_right_answers_match_and_others_are_as_alike_as_they_are():
    some = [
        Gap("a", "line", "x = ", "\n", "f(1, 2)"),
        Gap("b", "span", "", "", "y = 1\nz = 2"),
        Gap("c", "line", "", "", "abcd"),
    ]
    answers = ["f(1, 2) \nmore", "y = 1\nz = 2\n", "\nabxd\nabcd"]
    scores = judge(some, [{"completion": one} for one in answers])
    assert scores.values == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert scores.main.value == pytest.approx(2 / 3)
    assert scores.means["similarity"].value == pytest.approx((1 + 1 + 0.75) / 3)


@pytest.mark.parametrize(
    ("one", "other", "expected"), [("", "", 1.0), ("abc", "", 0.0), ("kitten", "sitting", 1 - 3 / 7), ("ab", "ba", 0.0)]
)
def test_similarity_is_that_of_levenshtein(one, other, expected):
    assert similarity(one, other) == pytest.approx(expected)


def test_gaps_are_filled_with_what_the_model_writes_between(folder, text, tmp_path):
    model, some = secateur.load(folder), gaps(str(text), None, 3)
    with Journal(tmp_path / "a.jsonl") as journal:
        Gaps(tuple(some)).ask(model, journal, lambda *_: None, 4)
    with Journal(tmp_path / "a.jsonl") as journal:
        found = [one["completion"] for one in journal.records]
    assert found == [model.generate(gap.before, 96, suffix=gap.after) for gap in some]
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:5]))
    with Journal(tmp_path / "b.jsonl") as journal:
        Gaps(tuple(some)).ask(model, journal, lambda *_: None, 4)
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_there_is_a_suffix_for_each_prompt(folder):
    with pytest.raises(ConfigError, match="2 prompts and 1 suffixes"):
        secateur.load(folder).generate_batch(["a", "b"], suffixes=["c"])


def test_the_task_from_question_to_table(folder, text, tmp_path):
    task = f"infill:{text}"
    found = evaluate([folder], [task], output=tmp_path / "out", problems=4)
    scores = found.cell(task, str(folder)).result
    assert (scores.metric, scores.problems) == ("exact match", 8)
    assert f"%: exact match of {task}" in found.to_table()
    samples = next((tmp_path / "out").rglob("samples.jsonl")).read_text().splitlines()
    assert [json.loads(line)["task_id"] for line in samples] == [gap.name for gap in gaps(str(text), None, 4)]
