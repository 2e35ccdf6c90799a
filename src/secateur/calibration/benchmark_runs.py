"""How much of the known benchmarks a calibration text holds: runs of 13 words and signs that both have.

Brown et al. 2020 (arXiv 2005.14165, appendix C) look for runs of 13 words, without signs and case, which programs are
made of. What is usual in programs has some such runs (lists of numbers, the head of a loop); a text that holds a
problem's question or solution as it is published has nearly all of its runs.
The runs of benchmarks are stored with this module as hashes, so that a text is checked on any machine, with any
tokenizer, without the problems; `benchmarks/store_benchmark_runs.py` writes them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

RUN = 13
_FEW = 5  # runs; a question or solution of fewer may stand in any program
_BYTES = 5  # of a hash: 60,000 runs of a text and 200,000 stored ones have one in a hundred chances of a false match
_STORED = Path(__file__).with_name("benchmark_runs.safetensors")
_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Overlap:
    """What a text has of one benchmark.

    Attributes
    ----------
    problems
        How many problems the benchmark has.
    touched
        How many have at least one run in the text.
    held
        How many have at least half of the runs of their question or of their solution there.
    """

    problems: int
    touched: int
    held: int


def runs(text: str) -> Iterator[str]:
    """Yield each run of 13 words and signs of a text, joined with blanks; none of a text that has fewer."""
    words = _WORDS.findall(text)
    return (" ".join(words[start : start + RUN]) for start in range(len(words) - RUN + 1))


def hash_runs(texts: Iterable[str]) -> NDArray[np.int64]:
    """Return the hashes of the different runs of texts, sorted: int64 [runs], of 40 bits each."""
    found = {run for text in texts for run in runs(text)}
    digests = (blake2b(run.encode(), digest_size=_BYTES).digest() for run in found)
    return np.array(sorted(int.from_bytes(digest, "big") for digest in digests), dtype=np.int64)


def count_overlaps(texts: Iterable[str]) -> dict[str, Overlap]:
    """Return what texts have of each known benchmark, by its name as a task."""
    seen, counted = hash_runs(texts), {}
    for name, (hashes, problems) in _stored().items():
        found = np.isin(hashes, seen)
        touched = sum(any(found[part].any() for part in parts) for parts in problems)
        held = sum(any(_is_held(found[part]) for part in parts) for parts in problems)
        counted[name] = Overlap(len(problems), touched, held)
    return counted


def _is_held(found: NDArray[np.bool_]) -> bool:
    return found.size >= _FEW and bool(found.mean() >= 0.5)


def write_runs(path: Path, benchmarks: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Store the runs of benchmarks, question and solution (or "") of each problem, as `count_overlaps` reads them.

    Raises
    ------
    ValueError
        For a problem without a run, which no text could be said to have.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for name, problems in benchmarks.items():
        parts = [hash_runs([text]) for problem in problems for text in problem]
        lengths = np.array([one.size for one in parts], dtype=np.int32).reshape(-1, 2)
        if not lengths.any(axis=1).all():
            raise ValueError(f"a problem of {name} has fewer than {RUN} words and signs")
        hashes = np.concatenate(parts).astype(">i8").view(np.uint8).reshape(-1, 8)[:, -_BYTES:]
        tensors[f"{name}.runs"] = np.ascontiguousarray(hashes)  # uint8 [runs, 5]
        tensors[f"{name}.lengths"] = lengths  # int32 [problems, 2]
    save_file(tensors, path)


@cache
def _stored() -> dict[str, tuple[NDArray[np.int64], list[tuple[slice, ...]]]]:
    """Return each benchmark's hashes, and which of them are of a problem's question and solution."""
    tensors = load_file(_STORED)
    benchmarks: dict[str, tuple[NDArray[np.int64], list[tuple[slice, ...]]]] = {}
    weights = 256 ** np.arange(_BYTES - 1, -1, -1, dtype=np.int64)
    for name in sorted(key.removesuffix(".runs") for key in tensors if key.endswith(".runs")):
        ends = [0, *np.cumsum(tensors[f"{name}.lengths"]).tolist()]
        parts = [slice(*pair) for pair in pairwise(ends)]
        benchmarks[name] = (tensors[f"{name}.runs"] @ weights, list(zip(parts[::2], parts[1::2], strict=True)))
    return benchmarks
