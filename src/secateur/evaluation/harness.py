"""Measures models on tasks, one model in memory at a time.

Names, text and the output path are checked for every model and task before the first model is opened.
"""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint.format import LOG, MANIFEST
from secateur.evaluation.asked import plan_asked
from secateur.evaluation.folder import working_folder
from secateur.evaluation.measuring import Measuring, Progress, compare_all, places
from secateur.evaluation.plan import WINDOWS_PER_DOCUMENT, check_arguments, make_plan
from secateur.evaluation.programs.generation import Asking
from secateur.evaluation.results import Evaluation
from secateur.files import atomic_folder

if TYPE_CHECKING:
    from secateur.models.source import ModelFolder

DEFAULT_LIMIT = 8000


def evaluate(
    models: str | Path | Sequence[str | Path],
    tasks: str | Sequence[str],
    *,
    against: str | Path | None = None,
    limit: int | None = None,
    data: Path | None = None,
    output: Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    skip_missing: bool = False,
    run_generated_code: bool = False,
    unsafe: bool = False,
    problems: int | None = None,
    asking: Asking | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure every model on every task, and compare each with `against` on the same documents or problems.

    Parameters
    ----------
    models
        Base models or sub-models, as `resolve_model` takes them; one or several.
    tasks
        Names such as `perplexity:python`, `humaneval`, `multipl-e:java` or `arc-easy`.
    against
        The model to compare with; it is measured as well, as the first column unless it is in `models`.
    limit
        Tokens of each domain; None means 8000.
    data
        Folder that is tried first for text.
    output
        Folder for results.json, and for answers and what came of them, which must not exist; None writes nothing. With
        tasks that models answer an interrupted evaluation goes on where it was.
    threads, device
        As `secateur.load`.
    skip_missing
        Leave the cell of a domain without text empty, with the reason, in place of an error.
    run_generated_code, unsafe
        Whether programs that models have written may be run, and whether without a sandbox.
    problems
        How many of each benchmark are asked; None means all.
    asking
        How models are asked for programs; its `batch` holds for all answers.
    workers
        How many programs run at a time; None means one for each processor.
    progress
        Called with `MODEL TASK`, how many windows, answers or runs are done, and their total.

    Raises
    ------
    UnknownNameError, ModelError, CorpusError, ConfigError, OutputError, SandboxError
        Before any model is opened.
    CheckpointError, ModelError
        When a model cannot be opened, or gives a likelihood that is not finite. Answers are kept then, nothing else.
    """
    import torch

    from secateur.models.device import checked_device, set_threads

    models = [models] if isinstance(models, str | Path) else models
    tasks = [tasks] if isinstance(tasks, str) else tasks
    limit = DEFAULT_LIMIT if limit is None else limit
    output = None if output is None else Path(output)
    check_arguments(models, tasks, limit, output)
    checked_device(device)
    if threads is not None:
        set_threads(threads)
    plan = make_plan(models, tasks, against=against, limit=limit, data=data, skip_missing=skip_missing)
    asked = plan_asked(
        plan.tasks,
        asking or Asking(),
        problems=problems,
        data=data,
        run_generated_code=run_generated_code,
        unsafe=unsafe,
        workers=workers,
    )
    hashes = {subject.name: _hashes(subject.folder) for subject in plan.subjects}
    settings = {
        "tokens_per_domain": limit,
        "window_length": plan.window_length,
        "windows_per_document": WINDOWS_PER_DOCUMENT,
        "device": device,
        "threads": torch.get_num_threads(),
        **asked.settings(),
    }
    begun = {"models": hashes, "folders": places(plan), "settings": settings, "benchmarks": asked.benchmarks()}
    begun |= {"asked_with": {one.name: _asked_with(one.folder) for one in plan.subjects}, "versions": _versions()}
    with _folder(output, begun, resumable=bool(begun["benchmarks"])) as folder:
        evaluation = _carry_out(Measuring(plan, asked, folder, device, threads, progress), begun)
        if folder is not None:
            (folder / "results.json").write_text(evaluation.to_json(), encoding="utf-8")
    return evaluation


def _carry_out(measuring: Measuring, begun: dict[str, Any]) -> Evaluation:
    """Measure all models and compare them; `begun` is what results depend on."""
    plan, hashes = measuring.plan, begun["models"]
    measured = [measuring.run(subject, hashes[subject.name]) for subject in plan.subjects]
    records, columns = [record for record, _ in measured], [cells for _, cells in measured]
    if plan.against is not None:
        columns = compare_all(records, columns, plan.against)
    return Evaluation(
        models=tuple(records),
        tasks=tuple(task.name for task in plan.tasks),
        against=plan.against,
        cells=tuple(cell for row in zip(*columns, strict=True) for cell in row),
        corpora=plan.corpora,
        settings=begun["settings"],
        versions=begun["versions"],
        benchmarks=begun["benchmarks"],
    )


@contextmanager
def _folder(output: Path | None, settings: dict[str, Any], *, resumable: bool) -> Iterator[Path | None]:
    """Give the folder for results, or None; `resumable` for one in which interrupted work is gone on with."""
    if output is None:
        yield None
    elif not resumable:
        with atomic_folder(output) as folder:
            yield folder
    else:
        with working_folder(output, settings) as folder:
            yield folder


def _hashes(folder: "ModelFolder") -> dict[str, str]:
    from secateur.files import sha256_file

    return {file.name: sha256_file(file) for file in (folder.path / "config.json", *folder.weight_files())}


def _asked_with(folder: "ModelFolder") -> dict[str, str]:
    """Return the hashes of what decides, beside the weights, how a model is asked and when its answers end."""
    from secateur.files import sha256_file

    weights = {*folder.weight_files(), folder.path / "config.json"}
    names = (MANIFEST, LOG, "README.md", "model.safetensors.index.json")  # which say nothing to a model
    files = (file for file in sorted(folder.path.rglob("*")) if file.is_file() and file.suffix != ".safetensors")
    others = (file for file in files if file not in weights and file.name not in names)
    return {str(file.relative_to(folder.path)): sha256_file(file) for file in others}


def _versions() -> dict[str, str]:
    import numpy
    import torch
    import transformers

    import secateur

    modules = {"secateur": secateur, "torch": torch, "transformers": transformers, "numpy": numpy}
    return {name: str(module.__version__) for name, module in modules.items()} | {"python": platform.python_version()}
