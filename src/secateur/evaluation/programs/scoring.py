"""Runs every answer and writes what came of it, which does not depend on the clock or on the order of runs."""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from secateur.evaluation.journal import Journal
from secateur.evaluation.programs.checking import check
from secateur.evaluation.programs.languages import Toolchain
from secateur.evaluation.programs.problem import Problem
from secateur.evaluation.programs.program import OUTCOMES, Verdict
from secateur.evaluation.programs.samples import Sample, by_problem
from secateur.evaluation.proportions import Share, mean_share, pass_at_k
from secateur.evaluation.sandbox.running import Runner
from secateur.evaluation.scores import Scores

_AHEAD = 4  # programs for each worker that wait for their turn


@dataclass(frozen=True)
class Scorer:
    """Runs answers.

    Attributes
    ----------
    problems
        By task_id.
    toolchain, runner
        What compiles and runs them, and where.
    workers
        How many run at a time.
    scale
        How much slower than usual this machine is.
    cut
        Whether answers end where the benchmark's stop strings begin; those that are generated here do already.
    """

    problems: Mapping[str, Problem]
    toolchain: Toolchain
    runner: Runner
    workers: int
    scale: float = 1.0
    cut: bool = False

    def score(self, samples: Sequence[Sample], journal: Journal, progress: Callable[[int, int], None]) -> None:
        """Run the answers that a journal does not have yet, and append what came of each in the order of the answers.

        The journal's records are those of the first answers; from the first on that is of another answer, or whose
        sandbox failed, all are run again.
        """
        again = (place for place, one in enumerate(journal.records) if not _stands(one, samples[place : place + 1]))
        journal.keep(next(again, None))
        done = len(journal.records)
        progress(done, len(samples))
        for sample, verdict in self._verdicts(samples[done:]):
            journal.append([result_of(sample, verdict)])
            done += 1
            progress(done, len(samples))

    def _verdicts(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Verdict]]:
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[tuple[Sample, Future[Verdict]]] = deque()
            try:
                for sample in samples:
                    waiting.append((sample, pool.submit(self._run, sample)))
                    if len(waiting) > _AHEAD * self.workers:
                        first, future = waiting.popleft()
                        yield first, future.result()
                while waiting:
                    first, future = waiting.popleft()
                    yield first, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()

    def _run(self, sample: Sample) -> Verdict:
        problem = self.problems[sample.task_id]
        program = problem.program(problem.cut(sample.completion) if self.cut else sample.completion)
        verdict = check(program, self.toolchain, self.runner, scale=self.scale)
        if verdict.outcome == "sandbox_failure":  # a busy machine may have no memory or process left for a moment
            verdict = check(program, self.toolchain, self.runner, scale=self.scale)
        return verdict


def _stands(record: Mapping[str, Any], samples: Sequence[Sample]) -> bool:
    """Return whether a line of results is one of this answer, if there is one, and tells what its program did."""
    return (
        bool(samples) and record.get("outcome") != "sandbox_failure" and _answer(samples[0]).items() <= record.items()
    )


def _answer(sample: Sample) -> dict[str, Any]:
    sha256 = hashlib.sha256(sample.completion.encode("utf-8", "surrogatepass")).hexdigest()
    return {"task_id": sample.task_id, "sample": sample.number, "completion_sha256": sha256}


def result_of(sample: Sample, verdict: Verdict) -> dict[str, Any]:
    """Return the line of an answer."""
    answer = _answer(sample)
    sha256 = answer.pop("completion_sha256")
    found = {"passed": verdict.passed, "outcome": verdict.outcome, "detail": verdict.detail}
    return {**answer, **found, "completion_sha256": sha256}


def scores_of(results: Sequence[Mapping[str, Any]], n_problems: int, style: str = "") -> Scores:
    """Sum up lines of results: pass@k with 95% intervals over problems, and how often answers ended in each way.

    k is 1 and each of 10 and 100 for which all problems have enough answers. `n_problems` is how many the task has.
    """
    counts = by_problem((result["task_id"], result["passed"]) for result in results)
    fewest = min(answers for answers, _ in counts.values())
    outcomes = Counter(result["outcome"] for result in results)
    means: dict[str, Share] = {}
    for k in (k for k in (1, 10, 100) if k <= fewest):
        means[f"pass@{k}"] = mean_share([pass_at_k(answers, correct, k) for answers, correct in counts.values()])
    return Scores(
        metric="pass@1",
        means=means,
        problems=len(counts),
        problems_of_task=n_problems,
        values={task_id: correct / answers for task_id, (answers, correct) in counts.items()},
        outcomes={name: outcomes[name] for name in OUTCOMES if outcomes[name]},
        style=style,
    )


def summary(results: Sequence[Mapping[str, Any]], n_problems: int) -> dict[str, Any]:
    """Return what `scores_of` finds as plain data, without the single problems."""
    scores = scores_of(results, n_problems)
    return {
        "problems": scores.problems,
        "problems_of_task": n_problems,
        "samples": len(results),
        **{name: asdict(share) for name, share in scores.means.items()},
        "outcomes": scores.outcomes,
    }
