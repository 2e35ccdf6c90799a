"""Kill a derivation at random moments, resume it, and compare every file with that of an undisturbed one.

    python benchmarks/kill_resume.py demo [--kills 5] [--samples 32] [--seed 0]

Each of the kills is a run of its own: `secateur derive` is killed (SIGKILL) at a moment drawn uniformly over the time
that the undisturbed run took, then started again with --resume. Exits with 1 when any file but derivation.log.json
differs.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from secateur.files import sha256_file

LOG = "derivation.log.json"


def command(options, output, *more):
    fixed = ["--for", options.domain, "--samples", str(options.samples), "-o", str(output)]
    return [sys.executable, "-c", "from secateur.cli import main; main()", "derive", options.model, *fixed, *more]


def hashes(folder):
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != LOG}


def killed_and_resumed(options, output, seconds):
    process = subprocess.Popen(command(options, output), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    partial = output.with_name(f"{output.name}.partial")
    left = len(list(partial.glob("*.safetensors"))) if partial.exists() else 0
    finished = output.exists()
    subprocess.run(command(options, output, "--resume"), check=True, capture_output=True)
    return "after the end" if finished else f"with {left} shards written"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        subprocess.run(command(options, Path(scratch) / "undisturbed"), check=True, capture_output=True)
        whole = time.perf_counter() - started
        expected = hashes(Path(scratch) / "undisturbed")
        print(f"undisturbed: {whole:.1f} s, {len(expected)} files")
        for number in range(options.kills):
            output, moment = Path(scratch) / f"killed-{number}", draw.uniform(0, whole)
            when = killed_and_resumed(options, output, moment)
            same = hashes(output) == expected
            different += not same
            print(f"killed at {moment:.1f} s {when}, resumed: {'same bytes' if same else 'DIFFERENT'}", flush=True)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
