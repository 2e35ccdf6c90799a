"""Measures one model after the other on all tasks of a plan, and compares what was found."""

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import secateur
from secateur.evaluation.asked import Asked
from secateur.evaluation.folder import RESERVED
from secateur.evaluation.journal import SAMPLES, Journal
from secateur.evaluation.perplexity import PerplexityResult, compare_perplexity, evaluate_perplexity
from secateur.evaluation.plan import Plan, Subject
from secateur.evaluation.programs.run import slug
from secateur.evaluation.proportions import holm
from secateur.evaluation.results import Cell, ModelRecord
from secateur.evaluation.scores import Scores, ScoresComparison, compare_scores
from secateur.evaluation.tasks import Task
from secateur.resources import release_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.calibration.held_out import Window

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measuring:
    """A plan that is being carried out.

    Attributes
    ----------
    asked
        What models answer.
    folder
        Where answers are kept, in a folder for each model.
    device, threads, progress
        As in `evaluate`.
    """

    plan: Plan
    asked: Asked
    folder: Path | None
    device: str
    threads: int | None
    progress: Progress | None

    def run(self, subject: Subject, hashes: dict[str, str]) -> tuple[ModelRecord, list[Cell]]:
        """Measure one model on all tasks; it is in memory once for text and once for answers, not at the same time."""
        found: dict[str, Cell] = {}
        precision, vocabulary = _described(subject)
        text = [task for task in self.plan.tasks if not task.has_answers]
        if text:
            precision, vocabulary = self._read_text(subject, text, found)
        engine = self._answer(subject, found) if len(text) < len(self.plan.tasks) else ""
        record = ModelRecord(subject.name, subject.folder.is_submodel(), hashes, precision, vocabulary, engine)
        return record, [found[task.name] for task in self.plan.tasks]

    def _reports(self, subject: Subject, what: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"{subject.name} {what}", done, total)

        return report

    def _read_text(self, subject: Subject, tasks: Sequence[Task], found: dict[str, Cell]) -> tuple[str, int]:
        from secateur.runtime.loading import open_model

        model = open_model(subject.folder, device=self.device)
        try:
            for task in tasks:
                found[task.name] = self._perplexity(model, task, subject)
            return str(model.dtype).removeprefix("torch."), model.config.get_text_config().vocab_size
        finally:
            del model
            gc.collect()  # modules and hooks refer to each other, and the next model needs the memory
            release_freed_memory()

    def _perplexity(self, model: "PreTrainedModel", task: Task, subject: Subject) -> Cell:
        windows = subject.text[task.name]
        if isinstance(windows, str):
            return Cell(task.name, subject.name, missing=windows)

        result = evaluate_perplexity(model, windows, task.domain, progress=self._reports(subject, task.name))
        return Cell(task.name, subject.name, _text_hash(windows), result)

    def _answer(self, subject: Subject, found: dict[str, Cell]) -> str:
        """Let a model write all its answers, then let it go and look at them; return what ran it."""
        assert self.folder is not None  # noqa: S101 - the plan has asked for one
        folder, style = self.folder / places(self.plan)[subject.name], ""
        model = secateur.load(subject.folder.path, threads=self.threads)
        engine = model.backend.name
        for task, one in self.asked.answered.items():
            (folder / slug(task)).mkdir(parents=True, exist_ok=True)
            with Journal(folder / slug(task) / SAMPLES) as journal:
                scores = one.ask(model, journal, self._reports(subject, f"{task}, answers"), self.asked.batch)
            found[task] = Cell(task, subject.name, one.sha256, scores)
        programs = self.asked.programs
        if programs is None:
            return engine
        for task in programs.loaded:
            style = programs.asking.chosen(model)
            programs.answer(task, model, folder, self._reports(subject, f"{task}, answers"))
        del model
        release_freed_memory()
        for task, benchmark in programs.loaded.items():
            judged = programs.judge(task, folder, style, self._reports(subject, f"{task}, runs"))
            found[task] = Cell(task, subject.name, benchmark.sha256, judged)
        return engine


def places(plan: Plan) -> dict[str, str]:
    """Return the folder of each model: the end of its name, with its number where another one ends alike."""
    ends = [slug(Path(one.name).name) for one in plan.subjects]
    return {
        one.name: end if ends.count(end) == 1 and end not in RESERVED else f"{number}-{end}"
        for number, (one, end) in enumerate(zip(plan.subjects, ends, strict=True), start=1)
    }


def compare_all(records: Sequence[ModelRecord], cells: list[list[Cell]], against: str) -> list[list[Cell]]:
    """Return the cells [models][tasks] with their comparison to the model called `against`."""
    parent = next(index for index, record in enumerate(records) if record.name == against)
    compared = [
        row
        if index == parent
        else [
            _compare(cell, other, against, same_vocabulary=records[index].vocabulary == records[parent].vocabulary)
            for cell, other in zip(row, cells[parent], strict=True)
        ]
        for index, row in enumerate(cells)
    ]
    return _corrected(compared)


def _compare(cell: Cell, other: Cell, against: str, *, same_vocabulary: bool) -> Cell:
    if isinstance(cell.result, Scores) and isinstance(other.result, Scores):
        return replace(cell, comparison=compare_scores(cell.result, other.result, against))
    if not isinstance(cell.result, PerplexityResult) or not isinstance(other.result, PerplexityResult):
        return cell
    # A trimmed vocabulary may split text into the same pieces, but shares its probability among fewer.
    comparable = same_vocabulary and cell.text_sha256 == other.text_sha256
    return replace(cell, comparison=compare_perplexity(cell.result, other.result, against, comparable=comparable))


def _corrected(cells: list[list[Cell]]) -> list[list[Cell]]:
    """Correct the p-values of all comparisons for how many there are."""
    places = [
        (row, column)
        for row, line in enumerate(cells)
        for column, cell in enumerate(line)
        if isinstance(cell.comparison, ScoresComparison)
    ]
    found = [cast(ScoresComparison, cells[row][column].comparison) for row, column in places]
    corrected = holm([one.paired.p_value for one in found])
    for (row, column), one, p_value in zip(places, found, corrected, strict=True):
        cells[row][column] = replace(cells[row][column], comparison=replace(one, p_corrected=p_value))
    return cells


def _described(subject: Subject) -> tuple[str, int]:
    """Return precision and vocabulary of a model that is not opened by transformers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(subject.folder.path, trust_remote_code=False).get_text_config()
    return str(config.dtype).removeprefix("torch."), config.vocab_size


def _text_hash(windows: "list[Window]") -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{window.document}\0{len(window.token_ids)}\0".encode())
        digest.update(window.token_ids.astype("<i8").tobytes())
    return digest.hexdigest()
