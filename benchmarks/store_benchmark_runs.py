"""Writes src/secateur/calibration/benchmark_runs.safetensors: hashes of what the benchmarks of programs say.

    python benchmarks/store_benchmark_runs.py --data DATA

Of a problem its prompt and, where it has one, its own solution; checks are left out. The data folder holds the
benchmarks as they are published (docs/evaluation.md).
"""

import argparse
from pathlib import Path

from secateur.calibration import benchmark_runs
from secateur.evaluation.programs.loading import load_benchmark

TASKS = ("humaneval", "mbpp", "multipl-e:java", "multipl-e:cpp", "multipl-e:javascript")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    benchmarks = {}
    for task in TASKS:
        loaded = load_benchmark(task, options.data)
        benchmarks[task] = [(one.prompt, one.solution or "") for one in loaded.problems.values()]
        print(f"{task}: {len(benchmarks[task])} problems, SHA-256 of the file {loaded.sha256}")
    path = Path(benchmark_runs.__file__).with_name("benchmark_runs.safetensors")
    benchmark_runs.write_runs(path, benchmarks)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
