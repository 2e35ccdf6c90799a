"""What an evaluation found: every model on every task, how it was measured, and both as JSON."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from secateur.evaluation.perplexity import PerplexityComparison, PerplexityResult
from secateur.evaluation.scores import Scores, ScoresComparison

if TYPE_CHECKING:
    from secateur.calibration.documents import Provenance

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelRecord:
    """A model that was measured.

    Attributes
    ----------
    name
        As the user called it.
    is_submodel
        Whether it is a sub-model or a base model.
    sha256
        SHA-256 of config.json and of each weight file, by file name.
    dtype
        Precision in which it was run.
    vocabulary
        Number of tokens that it can predict.
    engine
        What ran it where it answered, `native` or `torch`; empty where it only read text.
    """

    name: str
    is_submodel: bool
    sha256: dict[str, str]
    dtype: str
    vocabulary: int
    engine: str = ""


@dataclass(frozen=True)
class Cell:
    """One model on one task.

    Attributes
    ----------
    task, model
        Their names.
    text_sha256
        Hash of the documents' names and token ids that were measured, or of a benchmark's file; empty where there were
        none.
    result
        The figures, or None where there was no text.
    comparison
        Beside the model named by `against`; None without one, and for that model itself.
    missing
        Why there is no result, else None.
    """

    task: str
    model: str
    text_sha256: str = ""
    result: PerplexityResult | Scores | None = None
    comparison: PerplexityComparison | ScoresComparison | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The cells of tasks x models.

    Attributes
    ----------
    models
        In the order of the columns.
    tasks
        Names, in the order of the rows.
    against
        Name of the model that the others are compared with, or None.
    cells
        One for each task and model.
    corpora
        For each task the sources of its text; empty where there was none.
    benchmarks
        For each task that runs programs: file, hash, problems, compiler or interpreter.
    settings
        Tokens for each domain, window length in tokens, windows for each document, device, threads; how models were
        asked for programs.
    versions
        Of the software that ran.
    """

    models: tuple[ModelRecord, ...]
    tasks: tuple[str, ...]
    against: str | None
    cells: tuple[Cell, ...]
    corpora: dict[str, tuple["Provenance", ...]]
    settings: dict[str, Any]
    versions: dict[str, str]
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def cell(self, task: str, model: str) -> Cell:
        """Return the cell of a task and a model; raises `KeyError` when either was not evaluated."""
        for cell in self.cells:
            if (cell.task, cell.model) == (task, model):
                return cell
        raise KeyError((task, model))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; a number that is not finite becomes None."""
        data: dict[str, Any] = _finite(asdict(self))
        for cell, plain in zip(self.cells, data["cells"], strict=True):
            if isinstance(cell.result, PerplexityResult):
                result = cell.result
                counts = {"n_documents": result.n_documents, "n_tokens": result.n_tokens, "n_bytes": result.n_bytes}
                plain["result"] = counts | plain["result"]
        return {"format": "secateur-evaluation", "version": FORMAT_VERSION, **data}

    def to_json(self) -> str:
        """Return `to_dict` as text that ends with a line break."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_table(self) -> str:
        """Return a table of plain text, tasks down and models across."""
        from secateur.evaluation.tables import render

        return render(self)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
