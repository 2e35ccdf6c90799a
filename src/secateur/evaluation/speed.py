"""How fast a sub-model runs, and how much memory it takes, beside its peers in the same run.

Peers alternate question by question, each in a process of its own, and every figure is the median over rounds: what
else the machine does then falls on all of them. The memory bandwidth is measured in the same run, because it bounds
decoding.
"""

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from secateur.errors import ConfigError
from secateur.evaluation.speed_peers import Peer, find_peer, told_apart
from secateur.evaluation.speed_worker import Worker
from secateur.resources import usable_processors

DECODE_PROMPT = 64  # tokens before those whose decoding is timed
BUSY = 0.15  # share of the processors that others may use before the figures are called into question

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Speed:
    """What one model gave.

    Attributes
    ----------
    name, kind
        What it is, and what ran it.
    disk_mb
        Bytes of its files, in millions.
    load_seconds
        From the start of its process to the first question.
    resident_mb, private_mb
        Memory after all questions: all of it, and without pages of mapped files, which processes share.
    tokens_per_second
        For each question, such as `prefill 512` or `decode x8`, the figures of all rounds.
    read_mb
        What a decoded token reads, in millions of bytes; None where that is not known.
    unpacking_ms
        For each round what the products of a token take when their weights are cached: with no wait for memory.
    bound_ms
        The same if each weight takes what binds it: unpacking, or reading it at the bandwidth of that round.
    """

    name: str
    kind: str
    disk_mb: float
    load_seconds: float
    resident_mb: float
    private_mb: float
    tokens_per_second: Mapping[str, tuple[float, ...]]
    read_mb: float | None = None
    unpacking_ms: tuple[float, ...] = ()
    bound_ms: tuple[float, ...] = ()

    def median(self, question: str) -> float | None:
        """Return the median over rounds; None where the question was not put."""
        found = self.tokens_per_second.get(question)
        return statistics.median(found) if found else None


@dataclass(frozen=True)
class SpeedReport:
    """All models of one run, the sub-model first.

    Attributes
    ----------
    bandwidth_gb_per_second
        Read bandwidth of memory with the same threads, for each round; empty without the native code.
    busy
        Highest share of the processors that other programs used between questions.
    """

    models: tuple[Speed, ...]
    threads: int
    rounds: int
    bandwidth_gb_per_second: tuple[float, ...]
    busy: float
    machine: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


def benchmark(
    submodel: str | Path,
    against: Sequence[str] = (),
    *,
    threads: int | None = None,
    rounds: int = 3,
    prompt_lengths: Sequence[int] = (128, 512),
    new_tokens: int = 128,
    batch: int = 8,
    progress: Progress = lambda *_: None,
) -> SpeedReport:
    """Time a sub-model and its peers.

    Parameters
    ----------
    submodel
        A folder, or any model that the native engine or torch runs.
    against
        Peers as `find_peer` reads them.
    threads
        For every model; None means as many as this process may use.
    rounds
        How often every question is put to every model.
    prompt_lengths
        Tokens of the prompts whose reading is timed.
    new_tokens
        Tokens of each sequence whose decoding is timed.
    batch
        Sequences that are decoded together in a question of its own; 1 leaves it out.

    Raises
    ------
    ConfigError
        When a number cannot be, or a peer is not known.
    SecateurError
        When a model cannot be loaded.
    """
    if rounds < 1 or new_tokens < 1 or batch < 1 or min(prompt_lengths, default=1) < 1:
        raise ConfigError("rounds, prompt lengths, new tokens and batch have to be at least 1")
    count = threads or usable_processors()
    path = Path(submodel)
    peers = told_apart([Peer(path.name, "auto", str(submodel)), *(find_peer(spec, path) for spec in against)])
    questions = _questions(prompt_lengths, new_tokens, batch)
    with ExitStack() as stack:
        workers: list[Worker] = []
        for peer in peers:
            progress(f"loading {peer.name}", len(workers), len(peers))
            workers.append(Worker(peer.kind, peer.path, count))
            stack.callback(workers[-1].close)
        _check_lengths(peers, workers, max((*prompt_lengths, DECODE_PROMPT + new_tokens)))
        found, limits, bandwidth, busy = _take_turns(peers, workers, questions, rounds, count, progress)
        speeds = tuple(map(_speed, peers, workers, found, limits))
    return SpeedReport(speeds, count, rounds, tuple(bandwidth), busy, _machine())


def _take_turns(  # noqa: PLR0917
    peers: Sequence[Peer],
    workers: Sequence[Worker],
    questions: Mapping[str, Mapping[str, Any]],
    rounds: int,
    threads: int,
    progress: Progress,
) -> tuple[list[dict[str, list[float]]], list[list[dict[str, float]]], list[float], float]:
    """Put every question to every worker in every round.

    Returns tokens/s and limits of each, the bandwidths, and how busy the machine was.
    """
    found: list[dict[str, list[float]]] = [{} for _ in workers]
    limits: list[list[dict[str, float]]] = [[] for _ in workers]
    bandwidth: list[float] = []
    busy, done = 0.0, 0
    for number in range(rounds):
        bandwidth += _bandwidth(threads)
        for worker, own in zip(workers, limits, strict=True):
            if bandwidth:
                own.append(worker.ask("limits", bytes_per_second=bandwidth[-1] * 1e9))
        for name, question in questions.items():
            progress(name, done, rounds * len(questions))
            done += 1
            busy = max(busy, psutil.cpu_percent(interval=0.2) / 100)
            sequences = question.get("batch", 1)
            tokens = question.get("count", question["length"]) * sequences
            for peer, worker, figures in zip(peers, workers, found, strict=True):
                if peer.kind == "llama.cpp" and sequences > 1:  # its runner has one sequence
                    continue
                seconds = worker.ask(seed=number, **question)["seconds"]
                figures.setdefault(name, []).append(tokens / seconds)
    return found, limits, bandwidth, busy


def _speed(
    peer: Peer, worker: Worker, figures: Mapping[str, list[float]], limits: Sequence[Mapping[str, float]]
) -> Speed:
    used = worker.ask("memory")
    return Speed(
        peer.name,
        worker.loaded["kind"],
        _disk_mb(peer.path),
        worker.loaded["load_seconds"],
        used["resident_mb"],
        used["private_mb"],
        {name: tuple(values) for name, values in figures.items()},
        next((one["read_mb"] for one in limits if one), None),
        tuple(one["unpacking_ms"] for one in limits if one),
        tuple(one["bound_ms"] for one in limits if one),
    )


def _check_lengths(peers: Sequence[Peer], workers: Sequence[Worker], longest: int) -> None:
    """Raise `ConfigError` for texts that a model was not made for."""
    for peer, worker in zip(peers, workers, strict=True):
        positions = worker.loaded["max_positions"]
        if positions is not None and longest > positions:
            raise ConfigError(
                f"texts of {longest} tokens are longer than the {positions} positions of {peer.name!r}; "
                f"name shorter prompts or fewer new tokens ({DECODE_PROMPT} tokens are read before those)"
            )


def _questions(prompt_lengths: Sequence[int], new_tokens: int, batch: int) -> dict[str, dict[str, Any]]:
    questions: dict[str, dict[str, Any]] = {
        f"prefill {length}": {"question": "prefill", "length": length} for length in prompt_lengths
    }
    for size in sorted({1, batch}):
        name = "decode" if size == 1 else f"decode x{size}"
        questions[name] = {"question": "decode", "length": DECODE_PROMPT, "count": new_tokens, "batch": size}
    return questions


def _bandwidth(threads: int) -> list[float]:
    """Return the read bandwidth in GB/s, or nothing where the native code is missing."""
    from secateur.runtime.kernels import Pool, available
    from secateur.runtime.limits import bandwidth

    return [bandwidth(Pool(threads)) / 1e9] if available() else []


def _disk_mb(path: str) -> float:
    from secateur.models.source import resolve_model

    if path.endswith(".gguf"):
        return Path(path).stat().st_size / 1e6
    folder = resolve_model(path).path
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6


def _machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} logical processors, {platform.system()}"
