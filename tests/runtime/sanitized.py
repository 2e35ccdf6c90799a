"""Runs Python on the native code under AddressSanitizer and UndefinedBehaviorSanitizer (Linux, g++).

    python -m tests.runtime.sanitized [--count 1000] [--isa avx2]

builds the library, makes tiny models of every family and kind of values, and damages each kind `count` times on every
instruction set of this machine (see corruptions.py). Exits with 0 when each damaged model was refused or ran.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitized"
RECIPES = {
    **{values: {"values": values, "sparsity": 0.4} for values in ("base", "int8", "int4", "nl4")},
    "unmasked": {"values": "int4", "sparsity": 0.0},
    "eight-bits": {"values": "nl4", "sparsity": 0.0, "eight_bits": 0.5},
    "trimmed": {"values": "int8", "sparsity": 0.4, "trim_vocabulary": True},
}
VALUES = ("dense", *RECIPES)


def build(folder: Path) -> None:
    """Build the package with the sanitized library into `folder`/package."""
    subprocess.run(
        ["make", "-j2", "sanitized", f"SANITIZED={folder}", "CXX=g++"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return an environment in which Python loads that package; the sanitizer has to come before everything else."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    settings = {
        "PYTHONPATH": f"{folder / 'package'}:{ROOT}",
        "LD_PRELOAD": " ".join(found),
        # Python frees little when it ends. No limit of all memory: it would take a thread, with which one cannot fork.
        "ASAN_OPTIONS": "detect_leaks=0:max_allocation_size_mb=2048:allocator_may_return_null=1:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **settings, **more}


def run_python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the sanitized package; return what it said."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(folder, **variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        errors="replace",
    )


def make_models(root: Path, families: Sequence[str]) -> None:
    """Put a tiny model of each kind of values and each family into `root`/VALUES/FAMILY; needs torch."""
    from tests.runtime.native_models import LLAMA3, sub_model
    from tests.tiny import save_tiny

    changes = {"llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}}
    text = root / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 12)
    for family in families:
        base = save_tiny(root / "dense" / family, family, **changes.get(family, {}))
        for values, recipe in RECIPES.items():
            (root / values).mkdir(exist_ok=True)
            sub_model(base, text, root / values / family, **recipe)


def main() -> None:
    from secateur.runtime.kernels import instruction_sets
    from tests.runtime.native_models import NATIVE

    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--isa", action="append", help="one of this machine's instruction sets; all of them without it")
    options = parser.parse_args()
    build(BUILD)
    failed = False
    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name), NATIVE)
        for isa in options.isa or instruction_sets():
            for values in VALUES:
                numbers = ("--count", str(options.count), "--first", str(options.first))
                done = run_python(
                    BUILD, "-m", "tests.runtime.corruptions", f"{name}/{values}", *numbers, SECATEUR_ISA=isa
                )
                print(done.stdout + done.stderr, end="", flush=True)
                failed |= done.returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
