"""A benchmark in the format of HumanEval, small enough to be written down."""

import json
from pathlib import Path

RECORDS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def add_{number}(a, b):\n    """Return a + b + {number}."""\n',
        "entry_point": f"add_{number}",
        "canonical_solution": f"    return a + b + {number}\n",
        "test": f"def check(f):\n    assert f(1, 2) == {3 + number}\n    assert f(0, 0) == {number}\n",
    }
    for number in range(6)
]


def save_mini(folder: Path) -> Path:
    """Write it into a data folder; return the folder."""
    place = folder / "benchmarks" / "humaneval"
    place.mkdir(parents=True)
    (place / "HumanEval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def save_samples(path: Path, completions: list[tuple[int, str]]) -> Path:
    """Write answers (number of the problem, completion); return the file."""
    lines = [json.dumps({"task_id": f"HumanEval/{number}", "completion": text}) for number, text in completions]
    path.write_text("\n".join(lines) + "\n")
    return path
