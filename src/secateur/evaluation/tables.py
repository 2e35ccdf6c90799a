"""An evaluation as a table of plain text."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from secateur.evaluation.perplexity import PerplexityComparison, PerplexityResult

if TYPE_CHECKING:
    from secateur.evaluation.results import Cell, Evaluation

GAP = "  "


def render(evaluation: "Evaluation") -> str:
    """Return tasks down, models across, and below them what the figures mean."""
    names = [model.name for model in evaluation.models]
    rows = [["task", *names]]
    rows += [[task, *(format_cell(evaluation.cell(task, name)) for name in names)] for task in evaluation.tasks]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [GAP.join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, GAP.join("-" * width for width in widths))
    return "\n".join([*lines, *_notes(evaluation)]) + "\n"


def format_cell(cell: "Cell") -> str:
    """Return `7.36 ± 0.21`, with the ratio to the other model where there is one; `-` where there was no text."""
    if cell.result is None:
        return "-"
    text = format_perplexity(cell.result)
    return text if cell.comparison is None else f"{text}  {format_comparison(cell.comparison)}"


def format_perplexity(result: PerplexityResult) -> str:
    """Return the perplexity and one standard error, with as many digits as the error has to say."""
    if result.standard_error is None or not math.isfinite(result.perplexity):
        return f"{result.perplexity:.4g}"
    error = result.perplexity * result.standard_error
    digits = 2 if error <= 0 else max(0, 1 - math.floor(math.log10(error)))
    digits = min(digits, 4)
    return f"{result.perplexity:.{digits}f} ± {error:.{digits}f}"


def format_comparison(comparison: PerplexityComparison) -> str:
    """Return `x1.81 [1.74, 1.88]`, or the difference in bits per byte where perplexities are not comparable."""
    if comparison.ratio is not None:
        return f"x{_ratio(comparison.ratio)}" + _interval(comparison.ratio_low, comparison.ratio_high, _ratio)
    difference = comparison.bits_per_byte
    return f"{difference.value:+.3f} bits/byte" + _interval(difference.low, difference.high, "{:+.3f}".format)


def _interval(low: float | None, high: float | None, form: Callable[[float], str]) -> str:
    return "" if low is None or high is None else f" [{form(low)}, {form(high)}]"


def _ratio(value: float) -> str:
    """Three digits, zeros at the end too."""
    return f"{value:#.3g}".removesuffix(".")


def _notes(evaluation: "Evaluation") -> list[str]:
    comparisons = [cell.comparison for cell in evaluation.cells if cell.comparison is not None]
    notes = []
    if any(cell.result is not None and cell.result.standard_error is not None for cell in evaluation.cells):
        notes.append("±: one standard error, over documents")
    if any(comparison.comparable for comparison in comparisons):
        notes.append(f"x: perplexity over that of {evaluation.against} on the same documents [95% interval]")
    if any(not comparison.comparable for comparison in comparisons):
        notes.append(
            f"bits/byte: difference from {evaluation.against} on the same documents [95% interval]; "
            "the tokens differ, so perplexities cannot be compared"
        )
    reasons = {f"-: no text for {cell.task}: {cell.missing}": None for cell in evaluation.cells if cell.missing}
    return ["", *notes, *reasons] if notes or reasons else []
