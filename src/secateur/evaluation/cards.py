"""What was measured, in the model card of a sub-model."""

from pathlib import Path

from secateur.checkpoint.format import CARD, MANIFEST, dump_json
from secateur.checkpoint.inspect import read_manifest
from secateur.errors import CheckpointError
from secateur.evaluation.results import Evaluation
from secateur.evaluation.tables import format_cell, notes
from secateur.files import atomic_write_bytes, sha256_file
from secateur.models.source import resolve_model

_BEGIN, _END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"


def update_cards(evaluation: Evaluation) -> None:
    """Put its figures into the card of each sub-model of an evaluation."""
    for model in evaluation.models:
        if model.is_submodel:
            update_card(resolve_model(model.name).path, model.name, evaluation)


def update_card(folder: Path, name: str, evaluation: Evaluation) -> None:
    """Put the figures of the model called `name`, beside those it was compared with, into the card in its folder.

    What an earlier call has put there is replaced. The manifest, which has the card's hash, is written after it; should
    that be kept from happening, the same call mends it.

    Raises
    ------
    CheckpointError
        When the folder is no sub-model, or its card has the begin of such a section and not its end.
    """
    manifest = read_manifest(folder)
    text = (folder / CARD).read_text(encoding="utf-8")
    before, begun, rest = text.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if begun and not ended:
        raise CheckpointError(f"{str(folder / CARD)!r} has {_BEGIN} and no {_END}: put it back or remove the former")
    section = f"{_BEGIN}\n{_section(name, evaluation)}{_END}"
    whole = f"{before}{section}{after}" if begun else f"{text.rstrip()}\n\n{section}\n"
    atomic_write_bytes(folder / CARD, whole.encode())
    manifest["files"][CARD] = sha256_file(folder / CARD)
    atomic_write_bytes(folder / MANIFEST, dump_json(manifest))


def _section(name: str, evaluation: Evaluation) -> str:
    columns = list(dict.fromkeys(one for one in (evaluation.against, name) if one is not None))
    titles = ["this model" if one == name else Path(one).name or one for one in columns]
    lines = ["# What was measured", "", f"| | {' | '.join(titles)} |", f"|{'---|' * (len(columns) + 1)}"]
    for task in evaluation.tasks:
        cells = [format_cell(evaluation.cell(task, column)) for column in columns]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    versions = ", ".join(f"{what} {version}" for what, version in evaluation.versions.items())
    return "\n".join([*lines, "", *(f"{note}  " for note in notes(evaluation) if note), "", versions, ""])
