"""`secateur score`: whether the programs of a file of samples are right."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint.format import dump_json
from secateur.errors import ConfigError
from secateur.evaluation.folder import working_folder
from secateur.evaluation.journal import Journal
from secateur.evaluation.programs.checking import check_toolchain
from secateur.evaluation.programs.languages import toolchain
from secateur.evaluation.programs.loading import load_benchmark
from secateur.evaluation.programs.machine import slowness
from secateur.evaluation.programs.problem import FENCE
from secateur.evaluation.programs.program import OUTCOMES
from secateur.evaluation.programs.samples import Sample, read_samples
from secateur.evaluation.programs.scoring import Scorer, summary
from secateur.evaluation.sandbox.running import Runner, Sandbox, Unconfined
from secateur.files import atomic_write_bytes, sha256_file
from secateur.resources import usable_processors

RESULTS, SUMMARY = "results.jsonl", "summary.json"


def score(
    samples: Path,
    task: str,
    output: Path,
    *,
    run_generated_code: bool = False,
    unsafe: bool = False,
    data: Path | None = None,
    workers: int | None = None,
    cut: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run the programs of a file of samples; write results.jsonl, summary.json and manifest.json; return the summary.

    Parameters
    ----------
    samples
        Lines {"task_id", "completion"}, of this tool or any other; any subset of the task, any number of answers.
    task
        Such as `humaneval`.
    output
        A folder that does not exist. Interrupted, the same call goes on where it was.
    run_generated_code
        Nothing is run without it.
    unsafe
        Run without a sandbox: whatever a program does, it does to this machine.
    workers
        How many programs run at a time; None means one for each processor.
    cut
        Take of each completion what stands before the first of the benchmark's stop strings; without it all is run.

    Raises
    ------
    ConfigError, UnknownNameError, CorpusError, OutputError
        Before anything is run.
    SandboxError
        When there is no sandbox, or no compiler for the task's language.
    """
    runner = permitted_runner(run_generated_code=run_generated_code, unsafe=unsafe)
    loaded = load_benchmark(task, data)
    answers = read_samples(samples, loaded.problems)
    tools = toolchain(loaded.benchmark.language)
    check_toolchain(tools, runner)
    settings = {
        "task": task,
        "task_sha256": loaded.sha256,
        "samples_sha256": sha256_file(samples),
        "toolchain": tools.version,
        **sandbox_of(runner),
        "cut": cut,
    }

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(task, done, total)

    workers = workers or usable_processors()
    with working_folder(output, settings) as folder:
        scorer = Scorer(loaded.problems, tools, runner, workers, slowness(runner, workers), cut)
        with Journal(folder / RESULTS) as journal:
            scorer.score(answers, journal, report)
            found = {"task": task, **summary(journal.records, loaded.n_problems), **_not_code(answers)}
        atomic_write_bytes(folder / SUMMARY, dump_json(found))
    return found


def _not_code(answers: Sequence[Sample]) -> dict[str, int]:
    """Return how many answers are in a code block, under the name that a summary has for it; nothing if none is."""
    blocks = sum(one.completion.lstrip().startswith(FENCE.strip()) for one in answers)
    return {"in_code_blocks": blocks} if blocks else {}


def sandbox_of(runner: Runner) -> dict[str, Any]:
    """Return for the record whether programs run in a sandbox, and of which version their control groups are."""
    if not isinstance(runner, Sandbox):
        return {"sandbox": False}
    return {"sandbox": True, "control_groups": None if runner.groups is None else runner.groups.version}


def permitted_runner(*, run_generated_code: bool, unsafe: bool) -> Runner:
    """Return what runs programs; raises `ConfigError` where nobody has allowed it, `SandboxError` without a sandbox."""
    if not run_generated_code:
        raise ConfigError(
            "the task runs programs that a model has written, in a sandbox; say --run-generated-code if you want that"
        )
    return Unconfined() if unsafe else Sandbox()


def render(found: dict[str, Any]) -> str:
    """Return a summary as lines of text."""
    lines = [
        f"{found['task']}: {found['samples']} answers to {found['problems']} of {found['problems_of_task']} problems"
    ]
    for key, share in found.items():
        if key.startswith("pass@"):
            low, high = 100 * share["low"], 100 * share["high"]
            lines.append(f"{key}: {100 * share['value']:.1f}% [95% interval {low:.1f}, {high:.1f}]")
    lines += [f"{number} {name}: {OUTCOMES[name]}" for name, number in found["outcomes"].items()]
    if "in_code_blocks" in found:
        lines.append(f"{found['in_code_blocks']} begin with a code block; a completion is code that follows the prompt")
    if "sandbox_failure" in found["outcomes"]:
        lines.append("what could not be run counts as not solved: the figures above are too low")
    return "\n".join(lines) + "\n"
