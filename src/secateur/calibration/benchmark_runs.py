"""How much of the known benchmarks a calibration text holds: runs of 13 words and signs that both have.

Brown et al. 2020 (arXiv 2005.14165, appendix C) look for runs of 13 words in the same way. What is usual in programs
has some such runs (lists of numbers, the head of a loop); a text that holds a benchmark has nearly all of a problem's.
The runs of benchmarks are stored with this module as hashes, so that a text is checked on any machine, with any
tokenizer, without the problems; `benchmarks/store_benchmark_runs.py` writes them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

RUN = 13
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
        How many have at least half of their runs there.
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
        is_seen = np.isin(hashes, seen)
        shares = [float(is_seen[problem].mean()) for problem in problems]
        touched, held = sum(share > 0 for share in shares), sum(share >= 0.5 for share in shares)
        counted[name] = Overlap(len(problems), touched, held)
    return counted


def write_runs(path: Path, benchmarks: Mapping[str, Iterable[str]]) -> None:
    """Store the runs of benchmarks, each the texts of its problems, as `count_overlaps` reads them.

    Raises
    ------
    ValueError
        For a problem without a run, which no text could be said to have.
    """
    tensors = {}
    for name, texts in benchmarks.items():
        problems = [hash_runs([text]) for text in texts]
        if not all(one.size for one in problems):
            raise ValueError(f"a problem of {name} has fewer than {RUN} words and signs")
        hashes = np.concatenate(problems).astype(">i8").view(np.uint8).reshape(-1, 8)[:, -_BYTES:]
        tensors[f"{name}.runs"] = np.ascontiguousarray(hashes)  # uint8 [runs, 5]
        tensors[f"{name}.lengths"] = np.array([one.size for one in problems], dtype=np.int32)
    save_file(tensors, path)


@cache
def _stored() -> dict[str, tuple[NDArray[np.int64], list[slice]]]:
    """Return each benchmark's hashes, and which of them are a problem's."""
    tensors, benchmarks = load_file(_STORED), {}
    weights = 256 ** np.arange(_BYTES - 1, -1, -1, dtype=np.int64)
    for name in sorted(key.removesuffix(".runs") for key in tensors if key.endswith(".runs")):
        ends = [0, *np.cumsum(tensors[f"{name}.lengths"]).tolist()]
        benchmarks[name] = (tensors[f"{name}.runs"] @ weights, [slice(*pair) for pair in pairwise(ends)])
    return benchmarks
