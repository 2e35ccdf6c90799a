"""The benchmarks whose answers are programs, and how the records in which they are published are read."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from secateur.evaluation.programs.problem import Problem
from secateur.evaluation.programs.program import Language

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
    hub
        Name and configuration of the same records on the hub, whose test split is taken; empty where it has none.
    """

    name: str
    language: Language
    file: str
    read: Callable[[list[dict[str, Any]]], Iterator[Problem]]
    hub: tuple[str, ...] = ()


def humaneval(records: list[dict[str, Any]]) -> Iterator[Problem]:
    """Chen et al. 2021: a function's head and docstring; checks are a function that is given the function."""
    for one in records:
        checks = f"{one['test']}\ncheck({one['entry_point']})\n"
        called = (one["entry_point"],)
        yield Problem(
            one["task_id"], "python", one["prompt"], _STOP["python"], checks, one["canonical_solution"], called=called
        )


def mbpp(records: list[dict[str, Any]]) -> Iterator[Problem]:
    """Austin et al. 2021: a sentence and three asserts, as a docstring that the program follows.

    A chat model is not asked to complete a docstring, which is complete: models that repeat what they are given would
    end the answer behind it.
    """
    for one in records:
        if one["task_id"] not in _MBPP_TEST:
            continue
        tests = "\n".join(test.strip() for test in one["test_list"])
        prompt = f'"""\n{one["text"].strip()}\n{tests}\n"""\n'
        setup = one["test_setup_code"].replace("\r\n", "\n")
        solution = one["code"].replace("\r\n", "\n")
        called = tuple(name for name in re.findall(r"^def (\w+)", solution, re.MULTILINE) if name in tests)
        checks = f"{setup}\n{tests}\n"
        task = (
            f"{one['text'].strip()}\nThese tests have to pass:\n\n```python\n{tests}\n```\n\n"
            "Reply with the whole code in one code block."
        )
        yield Problem(
            f"MBPP/{one['task_id']}", "python", prompt, _MBPP_STOP, checks, solution, called=called, task=task
        )


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


def _multipl_e(name: str, of: str, language: Language) -> Benchmark:
    translated = f"{of}-{_SHORT.get(language, language)}"
    hub = () if language == "python" else ("nuprl/MultiPL-E", translated)
    return Benchmark(f"{name}:{language}", language, f"multipl_e/{translated}.jsonl", multipl_e(language), hub)


BENCHMARKS: dict[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark(
            "humaneval",
            "python",
            "humaneval/HumanEval.jsonl",
            humaneval,
            ("openai/openai_humaneval", "openai_humaneval"),
        ),
        Benchmark("mbpp", "python", "mbpp/mbpp.jsonl", mbpp, ("google-research-datasets/mbpp", "full")),
        *(_multipl_e("multipl-e", "humaneval", name) for name in _MULTIPL_E),
        *(_multipl_e("multipl-e-mbpp", "mbpp", name) for name in _MULTIPL_E if name != "python"),
    )
}
