"""What processes that run the same sub-model take together: its weights are mapped, so they are in memory once.

    python benchmarks/shared_memory.py SUB [--processes 8] [--new-tokens 256]

Starts processes one after the other; each opens the sub-model with one thread and generates. When all have, while all
live, memory is read from /proc (Linux): resident (RSS, counts shared pages in each process) and proportional (PSS,
counts a page that n processes share as 1/n in each, so that the sum is what is really taken). Also holds what one
process has resident against the size of the files plus the keys and values plus 200 MB.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from secateur.models.source import resolve_model
from secateur.runtime.loading import load

ALLOWANCE = 200e6  # bytes: the interpreter, the libraries, the tokenizer, scratch
PROMPT = "def quicksort(items):\n"


def child(model, new_tokens):
    """Generate, say what was taken, and live until the parent closes the pipe."""
    loaded = load(model, engine="native", threads=1)
    after_load = memory("self")["Rss"]
    loaded.generate(PROMPT, new_tokens, ignore_eos=True)
    a = loaded.backend.model.architecture
    tokens = len(loaded.backend.codec.encode(PROMPT)) + new_tokens
    keys_and_values = 2 * 2 * a.blocks * a.kv_heads * a.head_dim * tokens  # of two bytes each
    print(json.dumps({"after_load": after_load, "tokens": tokens, "keys_and_values": keys_and_values}), flush=True)
    sys.stdin.read()


def memory(process):
    """Return the counters of a process's memory, in bytes."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def mapped_weights(process):
    """Return RSS and PSS of the mapped weight files of a process, in bytes."""
    found, inside = {"Rss": 0, "Pss": 0}, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        key = line.split(maxsplit=1)[0]
        if not key.endswith(":"):
            inside = line.endswith(".safetensors")
        elif inside and key[:-1] in found:
            found[key[:-1]] += int(line.split()[1]) * 1024
    return found


def measure(options):
    """Return what each process said of itself, its memory, and that of its mapped weights."""
    command = [sys.executable, __file__, options.model, "--new-tokens", str(options.new_tokens), "--child"]
    processes, said = [], []
    try:
        for _ in range(options.processes):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(process)
            said.append(json.loads(process.stdout.readline()))
        return said, [memory(one.pid) for one in processes], [mapped_weights(one.pid) for one in processes]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.model, options.new_tokens)
        return
    said, whole, weights = measure(options)
    files = sum(path.stat().st_size for path in resolve_model(options.model).weight_files())
    print(f"{options.processes} processes with {options.model}, weight files {files / 1e6:.0f} MB")
    print(f"{'MB':>16} {'RSS':>8} {'PSS':>8} {'private':>8} {'weights RSS':>12} {'weights PSS':>12}")
    rows = [
        (one["Rss"], one["Pss"], one["Private_Clean"] + one["Private_Dirty"], mapped["Rss"], mapped["Pss"])
        for one, mapped in zip(whole, weights, strict=True)
    ]
    for name, row in [*enumerate(rows, 1), ("together", [sum(column) for column in zip(*rows, strict=True)])]:
        values = [f"{value / 1e6:.0f}" for value in row]
        print(f"{name:>16} {values[0]:>8} {values[1]:>8} {values[2]:>8} {values[3]:>12} {values[4]:>12}")
    first = said[0]
    budget = files + first["keys_and_values"] + ALLOWANCE
    print(
        f"one process: {first['after_load'] / 1e6:.0f} MB resident after loading, {rows[0][0] / 1e6:.0f} MB after "
        f"{options.new_tokens} tokens; files, keys and values of {first['tokens']} tokens "
        f"({first['keys_and_values'] / 1e6:.1f} MB) and 200 MB are {budget / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
