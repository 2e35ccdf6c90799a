"""An evaluation as a table of plain text."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from secateur.evaluation.perplexity import PerplexityComparison, PerplexityResult
from secateur.evaluation.proportions import Share
from secateur.evaluation.scores import Scores, ScoresComparison

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
    return "\n".join([*lines, *notes(evaluation)]) + "\n"


def format_cell(cell: "Cell") -> str:
    """Return `7.36 ± 0.21`, with the ratio to the other model where there is one; `-` where there was no text."""
    if cell.result is None:
        return "-"
    text = format_scores(cell.result) if isinstance(cell.result, Scores) else format_perplexity(cell.result)
    if isinstance(cell.comparison, PerplexityComparison):
        text += f"  {format_comparison(cell.comparison)}"
    elif cell.comparison is not None:
        text += f"  {format_difference(cell.comparison)}"
    return text


def format_scores(scores: Scores) -> str:
    """Return `61.0% [53, 68]`, the mean with its 95% interval."""
    return _percent(scores.main, "{:.1f}")


def format_difference(comparison: ScoresComparison) -> str:
    """Return `-12.2 [-18, -6], p 0.003`: points, and the corrected p-value."""
    one = comparison.paired
    p_value = one.p_value if comparison.p_corrected is None else comparison.p_corrected
    small = "p < 0.001" if p_value < 0.001 else f"p {p_value:.3f}"
    return f"{_percent(one.difference, '{:+.1f}').replace('%', '')}, {small}"


def _percent(share: Share, form: str) -> str:
    return f"{form.format(100 * share.value)}% [{100 * share.low:.0f}, {100 * share.high:.0f}]"


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


def notes(evaluation: "Evaluation") -> list[str]:
    """Return what the figures mean, a line each, behind an empty one; or nothing."""
    comparisons = [cell.comparison for cell in evaluation.cells if isinstance(cell.comparison, PerplexityComparison)]
    results = [cell.result for cell in evaluation.cells if isinstance(cell.result, PerplexityResult)]
    notes = []
    if any(result.standard_error is not None for result in results):
        notes.append("±: one standard error, over documents")
    notes += _score_notes(evaluation)
    if any(comparison.comparable for comparison in comparisons):
        notes.append(f"x: perplexity over that of {evaluation.against} on the same documents [95% interval]")
    if any(not comparison.comparable for comparison in comparisons):
        notes.append(
            f"bits/byte: difference from {evaluation.against} on the same documents [95% interval]; "
            "the tokens differ, so perplexities cannot be compared"
        )
    reasons = {f"-: no text for {cell.task}: {cell.missing}": None for cell in evaluation.cells if cell.missing}
    return ["", *notes, *reasons] if notes or reasons else []


def _score_notes(evaluation: "Evaluation") -> list[str]:
    found = [(cell.task, cell.result) for cell in evaluation.cells if isinstance(cell.result, Scores)]
    if not found:
        return []
    metrics: dict[str, list[str]] = {}
    for task, scores in found:
        tasks = metrics.setdefault(scores.metric, [])
        tasks += [task] if task not in tasks else []
    lines = [f"%: {metric} of {', '.join(tasks)} [95% interval]" for metric, tasks in metrics.items()]
    lines += _styles(evaluation)
    if any(isinstance(cell.comparison, ScoresComparison) for cell in evaluation.cells):
        lines.append(
            f"+-: points more or less than {evaluation.against} on the same problems [95% interval], "
            "p corrected for how many comparisons there are"
        )
    failed = sum(scores.outcomes.get("sandbox_failure", 0) for _, scores in found)
    if failed:
        lines.append(f"{failed} answers were not run: their sandbox could not be set up; the figures are too low")
    impossible = sum(scores.outcomes.get("impossible", 0) for _, scores in found)
    if impossible:
        lines.append(
            f"{impossible} questions count as wrong because the model's trimmed head has no choice of theirs; "
            "the figures say nothing about them"
        )
    shortened = sum(scores.outcomes.get("shortened", 0) for _, scores in found)
    if shortened:
        lines.append(f"{shortened} times the beginning of a question was left out: the model takes no more tokens")
    return lines


def _styles(evaluation: "Evaluation") -> list[str]:
    """Return how models were asked, each apart where that differs: then models are not all that is compared."""
    styles: dict[str, list[str]] = {}
    for cell in evaluation.cells:
        if isinstance(cell.result, Scores) and cell.result.style:
            models = styles.setdefault(cell.result.style, [])
            models += [cell.model] if cell.model not in models else []
    if len(styles) < 2:
        return [f"asked: {style}" for style in styles]
    told = "; ".join(f"{style}: {', '.join(models)}" for style, models in sorted(styles.items()))
    return [f"asked in different styles ({told}): differences are also of that; --prompt-style makes them the same"]
