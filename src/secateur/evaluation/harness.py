"""Measures models on tasks, one model in memory at a time.

Names, text and the output path are checked for every model and task before the first model is opened.
"""

import gc
import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.evaluation.plan import WINDOWS_PER_DOCUMENT, Subject, check_arguments, make_plan
from secateur.evaluation.results import Cell, Evaluation, ModelRecord
from secateur.evaluation.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.calibration.held_out import Window
    from secateur.models.source import ModelFolder

DEFAULT_LIMIT = 8000

Progress = Callable[[str, int, int], None]


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
    progress: Progress | None = None,
) -> Evaluation:
    """Measure every model on every task, and compare each with `against` on the same documents.

    Parameters
    ----------
    models
        Base models or sub-models, as `resolve_model` takes them; one or several.
    tasks
        Names such as `perplexity:python`.
    against
        The model to compare with; it is measured as well, as the first column unless it is in `models`.
    limit
        Tokens of each domain; None means 8000.
    data
        Folder that is tried first for text.
    output
        Folder for results.json, which must not exist; None writes nothing.
    threads, device
        As `secateur.load`.
    skip_missing
        Leave the cell of a domain without text empty, with the reason, in place of an error.
    progress
        Called with `MODEL TASK`, the number of windows done and their total.

    Raises
    ------
    UnknownNameError, ModelError, CorpusError, ConfigError, OutputError
        Before any model is opened.
    CheckpointError, ModelError
        When a model cannot be opened, or gives a likelihood that is not finite. Nothing is written then.
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
    measured = [_measure(subject, plan.tasks, device, progress) for subject in plan.subjects]
    records, columns = [record for record, _ in measured], [cells for _, cells in measured]
    if plan.against is not None:
        columns = _compare_all(records, columns, plan.against)
    evaluation = Evaluation(
        models=tuple(records),
        tasks=tuple(task.name for task in plan.tasks),
        against=plan.against,
        cells=tuple(cell for row in zip(*columns, strict=True) for cell in row),
        corpora=plan.corpora,
        settings={
            "tokens_per_domain": limit,
            "window_length": plan.window_length,
            "windows_per_document": WINDOWS_PER_DOCUMENT,
            "device": device,
            "threads": torch.get_num_threads(),
        },
        versions=_versions(),
    )
    if output is not None:
        _write(evaluation, output)
    return evaluation


def _measure(
    subject: Subject, tasks: Sequence[Task], device: str, progress: Progress | None
) -> tuple[ModelRecord, list[Cell]]:
    """Open one model, run all tasks on it, and let it go."""
    from secateur.files import release_freed_memory
    from secateur.runtime.loading import open_model

    model = open_model(subject.folder, device=device)
    try:
        cells = [_run(model, task, subject, progress) for task in tasks]
        record = ModelRecord(
            subject.name,
            subject.folder.is_submodel(),
            _hashes(subject.folder),
            str(model.dtype).removeprefix("torch."),
            model.config.get_text_config().vocab_size,
        )
    finally:
        del model
        gc.collect()  # modules and hooks refer to each other, and the next model needs the memory
        release_freed_memory()
    return record, cells


def _run(model: "PreTrainedModel", task: Task, subject: Subject, progress: Progress | None) -> Cell:
    from secateur.evaluation.perplexity import evaluate_perplexity

    windows = subject.text[task.name]
    if isinstance(windows, str):
        return Cell(task.name, subject.name, missing=windows)

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(f"{subject.name} {task.name}", done, total)

    result = evaluate_perplexity(model, windows, task.domain, progress=report)
    return Cell(task.name, subject.name, _text_hash(windows), result)


def _compare_all(records: list[ModelRecord], cells: list[list[Cell]], against: str) -> list[list[Cell]]:
    """Return the cells [models][tasks] with their comparison to the model called `against`."""
    parent = next(index for index, record in enumerate(records) if record.name == against)
    return [
        row
        if index == parent
        else [
            _compare(cell, other, against, same_vocabulary=records[index].vocabulary == records[parent].vocabulary)
            for cell, other in zip(row, cells[parent], strict=True)
        ]
        for index, row in enumerate(cells)
    ]


def _compare(cell: Cell, other: Cell, against: str, *, same_vocabulary: bool) -> Cell:
    from secateur.evaluation.perplexity import compare_perplexity

    if cell.result is None or other.result is None:
        return cell
    # A trimmed vocabulary may split text into the same pieces, but shares its probability among fewer.
    comparable = same_vocabulary and cell.text_sha256 == other.text_sha256
    return replace(cell, comparison=compare_perplexity(cell.result, other.result, against, comparable=comparable))


def _text_hash(windows: "list[Window]") -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{window.document}\0{len(window.token_ids)}\0".encode())
        digest.update(window.token_ids.astype("<i8").tobytes())
    return digest.hexdigest()


def _hashes(folder: "ModelFolder") -> dict[str, str]:
    from secateur.files import sha256_file

    return {file.name: sha256_file(file) for file in (folder.path / "config.json", *folder.weight_files())}


def _versions() -> dict[str, str]:
    import numpy
    import torch
    import transformers

    import secateur

    modules = {"secateur": secateur, "torch": torch, "transformers": transformers, "numpy": numpy}
    return {name: str(module.__version__) for name, module in modules.items()} | {"python": platform.python_version()}


def _write(evaluation: Evaluation, output: Path) -> None:
    from secateur.files import atomic_folder

    with atomic_folder(output) as partial:
        (partial / "results.json").write_text(evaluation.to_json(), encoding="utf-8")
