"""What an evaluation needs to run programs, worked out before the first model is opened."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.evaluation.programs.checking import check_toolchain
from secateur.evaluation.programs.generation import PROMPTS, Asking
from secateur.evaluation.programs.languages import toolchain
from secateur.evaluation.programs.loading import load_benchmark
from secateur.evaluation.programs.machine import slowness
from secateur.evaluation.programs.run import Programs, chosen
from secateur.evaluation.programs.score import permitted_runner, sandbox_of
from secateur.resources import usable_processors


def plan_programs(
    tasks: Sequence[str],
    asking: Asking,
    *,
    problems: int | None,
    data: Path | None,
    run_generated_code: bool,
    unsafe: bool,
    workers: int | None,
) -> Programs | None:
    """Return what runs the programs of some tasks; None without tasks.

    Raises
    ------
    ConfigError
        When nobody has allowed to run programs, or a number cannot be used.
    CorpusError
        When a benchmark is not at hand.
    SandboxError
        When there is no sandbox, or no compiler.
    """
    if not tasks:
        return None
    runner = permitted_runner(run_generated_code=run_generated_code, unsafe=unsafe)
    loaded = {task: load_benchmark(task, data) for task in tasks}
    tools = {task: toolchain(one.benchmark.language) for task, one in loaded.items()}
    for one in {one.language: one for one in tools.values()}.values():
        check_toolchain(one, runner)
    workers = workers or usable_processors()
    asked = {task: replace(one, problems=chosen(one.problems, problems)) for task, one in loaded.items()}
    return Programs(asked, tools, asking, runner, workers, slowness(runner, workers))


def settings_of(programs: Programs) -> dict[str, Any]:
    """Return what answers and results depend on, for the record and to be compared with when work is gone on with."""
    asking = programs.asking
    return {
        "prompts": PROMPTS,
        **sandbox_of(programs.runner),
        "prompt_style": asking.style,
        "answers": asking.samples,
        "temperature": asking.temperature,
        "seed": asking.seed,
        "max_new_tokens": asking.max_new_tokens,
        "batch": asking.batch,
    }


def benchmarks_of(programs: Programs) -> dict[str, dict[str, Any]]:
    """Return for each task its file's hash, how many problems were asked of how many, and what ran the programs."""
    return {
        task: {
            "sha256": one.sha256,
            "problems": len(one.problems),
            "problems_of_task": one.n_problems,
            "toolchain": programs.toolchains[task].version,
        }
        for task, one in programs.loaded.items()
    }
