"""Sub-models whose files were changed at random: the engine refuses them or computes something, and never crashes."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.models.source import resolve_model
from secateur.runtime.engine import open_native
from secateur.runtime.options import GenerationOptions
from tests.runtime.native_models import sub_model
from tests.tiny import save_tiny

CASES = 250


def corrupt(file: Path, draw: random.Random) -> None:
    """Change a few bytes, mostly of the header and of offsets, or cut the file."""
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    kind = draw.randrange(6)
    if kind == 0:
        del content[draw.randrange(len(content)) :]
    else:
        for _ in range(draw.choice((1, 1, 4, 50))):
            place = draw.randrange(header) if kind < 3 else draw.randrange(len(content))
            content[place] = draw.choice((0, 255, content[place] ^ 1 << draw.randrange(8), ord("9")))
    file.write_bytes(content)


def outcomes(folder: Path, work: Path, seed: int) -> dict[str, int]:
    """Corrupt one shard at a time; count what happens. Anything but a `SecateurError` passes through."""
    draw = random.Random(seed)  # noqa: S311 - repeatable, not secret
    counts = {"refused": 0, "ran": 0}
    files = sorted(folder.glob("*.safetensors"))
    for _ in range(CASES):
        victim = draw.choice(files)
        target = work / victim.name
        shutil.copyfile(victim, target)
        corrupt(target, draw)
        try:
            backend = open_native(resolve_model(str(work)), threads=1)
            list(backend.generate([1, 2, 3], GenerationOptions(max_new_tokens=3, ignore_eos=True)))
            counts["ran"] += 1
        except SecateurError:
            counts["refused"] += 1
        shutil.copyfile(victim, target)
    return counts


RECIPES = {
    **{values: {"values": values} for values in ("base", "int8", "int4")},
    "without a bitmask": {"values": "int4", "sparsity": 0.0},
    "trimmed": {"values": "int8", "trim_vocabulary": True},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_corrupted_files_are_refused_or_harmless(tmp_path, recipe):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 12)
    base = save_tiny(tmp_path / "base", "qwen2")
    folder = sub_model(base, text, tmp_path / "sub", **{"sparsity": 0.4, **RECIPES[recipe]})
    shutil.copytree(folder, tmp_path / "work")
    # In a process of its own: a crash would otherwise take the test with it.
    code = (
        "import json, sys; from pathlib import Path; from tests.runtime.test_corruption import outcomes;"
        "print(json.dumps(outcomes(Path(sys.argv[1]), Path(sys.argv[2]), 1)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "work")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts["refused"] > CASES / 3
    assert counts["ran"] > CASES / 20
