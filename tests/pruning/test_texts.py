"""What a sub-model says of the text it comes from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from secateur.calibration.benchmark_runs import Overlap
from secateur.checkpoint.format import CARD, MANIFEST, read_json
from tests.pruning.tiny_derivation import calibration, derive_tiny
from tests.tiny import save_tiny

SOME = {"humaneval": Overlap(164, 3, 0), "mbpp": Overlap(500, 9, 0)}


@pytest.mark.parametrize("held", [0, 2])
def test_what_it_shares_with_benchmarks(tmp_path: Path, held: int) -> None:
    base, said = save_tiny(tmp_path / "base", "llama"), []
    text = replace(calibration(), benchmarks={**SOME, "mbpp": Overlap(500, 9, held)})
    derive_tiny(base, tmp_path / "sub", calibration=text, announce=said.append)
    recorded = read_json(tmp_path / "sub" / MANIFEST)["calibration"]["benchmarks"]
    assert json.dumps(recorded["mbpp"]) == f'{{"problems": 500, "touched": 9, "held": {held}}}'
    assert recorded["humaneval"] == {"problems": 164, "touched": 3, "held": 0}
    row = next(line for line in (tmp_path / "sub" / CARD).read_text().splitlines() if line.startswith("| benchmarks"))
    assert row.endswith(f"calibration: humaneval 3, 0 of 164, mbpp 9, {held} of 500 |")
    warned = [line for line in said if "holds" in line]
    assert warned == [] if not held else "calibration holds 2 of the 500 problems of mbpp" in warned[0]
