"""A report of speed as a table of plain text."""

import statistics

from secateur.evaluation.speed import BUSY, Speed, SpeedReport


def render(report: SpeedReport) -> str:
    """Return figures down, models across; beside each peer's speed how many times as fast the first model is."""
    first = report.models[0]
    rows = [["", *(model.name for model in report.models)], ["run by", *(model.kind for model in report.models)]]
    for question in first.tokens_per_second:
        rows.append([f"{question}, tokens/s", *(_rate(model, first, question) for model in report.models)])
    rows += [
        ["MB on disk", *(f"{model.disk_mb:.0f}" for model in report.models)],
        ["MB resident", *(f"{model.resident_mb:.0f}" for model in report.models)],
        ["MB of its own", *(f"{model.private_mb:.0f}" for model in report.models)],
        ["seconds to load", *(f"{model.load_seconds:.2f}" for model in report.models)],
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_notes(report)]) + "\n"


def _rate(model: Speed, first: Speed, question: str) -> str:
    own, mine = model.median(question), first.median(question)
    if own is None or mine is None:
        return "-"
    return f"{own:.1f}" if model is first else f"{own:.1f} (x{mine / own:.2f})"


def _notes(report: SpeedReport) -> list[str]:
    notes = [
        f"{report.machine}; {report.threads} threads; medians of {report.rounds} alternating rounds; "
        "(xN): the first model is N times as fast",
        "MB of its own: without pages of mapped files, which processes share",
    ]
    if report.bandwidth_gb_per_second:
        bandwidth = statistics.median(report.bandwidth_gb_per_second)
        notes.append(f"memory bandwidth, read: {bandwidth:.1f} GB/s")
        notes += [line for model in report.models for line in _limits(model, bandwidth)]
    if report.busy > BUSY:
        notes.append(
            f"WARNING: other programs used up to {report.busy:.0%} of the processors between questions: the machine "
            "is too busy to measure; repeat this when it is idle"
        )
    return notes


def _limits(model: Speed, bandwidth: float) -> list[str]:
    """Return how far decoding is from what bounds it: the bandwidth, and the kernels without memory."""
    rate = model.median("decode")
    if rate is None or model.read_mb is None or not model.bound_ms:
        return []
    reached = rate * model.read_mb / 1e3
    unpacking, bound = statistics.median(model.unpacking_ms), statistics.median(model.bound_ms)
    return [
        f"{model.name}: decode reads {model.read_mb:.0f} MB a token, {reached:.1f} GB/s, {reached / bandwidth:.0%} of "
        f"the bandwidth; unpacking alone takes {unpacking:.1f} ms, {unpacking * rate / 1e3:.0%} of the time of a token"
        f"; with what binds each weight {bound:.1f} ms, {bound * rate / 1e3:.0%}"
    ]
