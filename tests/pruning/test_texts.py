"""What a sub-model says of the text it comes from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from secateur.calibration.benchmark_runs import Overlap
from secateur.checkpoint.card import model_card
from secateur.checkpoint.format import CARD, MANIFEST, read_json
from tests.pruning.tiny_derivation import calibration, derive_tiny
from tests.tiny import save_tiny

SOME = {"humaneval": Overlap(164, 3, 0), "mbpp": Overlap(500, 9, 0)}


@pytest.mark.parametrize("held", [0, 2])
def test_what_it_shares_with_benchmarks(tmp_path: Path, held: int) -> None:
    base, said = save_tiny(tmp_path / "base", "llama"), []
    text = replace(calibration(), benchmarks={**SOME, "mbpp": Overlap(500, 9, held)})
    learnt = replace(calibration(samples=12), benchmarks={"mbpp": Overlap(500, 7, held // 2)})
    derive_tiny(base, tmp_path / "sub", calibration=text, recovery=learnt, announce=said.append)
    recorded = read_json(tmp_path / "sub" / MANIFEST)["calibration"]["benchmarks"]
    assert json.dumps(recorded["mbpp"]) == f'{{"problems": 500, "touched": 9, "held": {held}}}'
    assert recorded["humaneval"] == {"problems": 164, "touched": 3, "held": 0}
    row = next(line for line in (tmp_path / "sub" / CARD).read_text().splitlines() if line.startswith("| benchmarks"))
    assert row.endswith(
        f"calibration: humaneval 3, 0 of 164, mbpp 9, {held} of 500; recovery: mbpp 7, {held // 2} of 500 |"
    )
    assert read_json(tmp_path / "sub" / MANIFEST)["recovery"]["benchmarks"]["mbpp"]["touched"] == 7
    warned = [line for line in said if "holds" in line]
    assert len(warned) == held
    assert not held or "calibration holds 2 of the 500 problems of mbpp" in warned[0]
    assert not held or "recovery holds 1 of the 500 problems of mbpp" in warned[1]


def test_a_folder_of_a_time_when_nobody_looked_is_the_same(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    derive_tiny(base, tmp_path / "sub", recovery=calibration(samples=12))
    manifest = read_json(tmp_path / "sub" / MANIFEST)
    for text in ("calibration", "recovery"):
        del manifest[text]["benchmarks"]
    del manifest["recipe"]["recover_for"]
    (tmp_path / "sub" / MANIFEST).write_text(json.dumps(manifest))
    text = replace(calibration(), benchmarks=SOME)
    again = derive_tiny(base, tmp_path / "sub", calibration=text, recovery=calibration(samples=12), resume=True)
    assert again.log == {}
    assert "| benchmarks" not in model_card(manifest)
