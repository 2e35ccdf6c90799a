"""How fast the native kernels are, beside how fast memory can be read in the same run.

    python benchmarks/kernel_speed.py [--shape 4096x4096] [--batches 1,8,512] [--threads 1,2] [--kinds int8,int4,bf16]
                                 [--sparsity 0.5] [--dense] [--isa avx512,avx2] [--megabytes 400] [--json FILE]

Copies of one random weight are used in turn, so that each product reads its weight from memory and not from a cache:
choose `--megabytes` above the processor's largest cache. Each figure is the median of passes over all copies, taken in
turn with passes that only read as many bytes. `weights/s` counts all positions, removed ones too.
"""

import argparse
import ctypes
import itertools
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from secateur.runtime import kernels
from secateur.runtime.kernels import NativeWeight, Pool, matmul
from secateur.runtime.limits import read_memory

SECONDS = 0.5  # for each figure


def random_parts(rng, kind, shape, group_size, sparsity):
    """Parts of a random weight; sparsity None: dense."""
    rows, cols = shape
    counts = np.full(rows, cols)
    parts = {}
    if sparsity is not None:
        words = -(-cols // 64)
        bits = rng.random((rows, cols), np.float32) >= sparsity
        counts = bits.sum(axis=1)
        bitmask = np.zeros((rows, words * 8), np.uint8)
        packed = np.packbits(bits, axis=1, bitorder="little")
        bitmask[:, : packed.shape[1]] = packed
        parts["bitmask"] = bitmask
    stored = (counts + 1) // 2 if kind in {"int4", "nl4"} else counts
    if sparsity is not None:
        parts["row_offsets"] = np.concatenate([[0], np.cumsum(stored)]).astype(np.int64)
    total = int(stored.sum()) + 64
    if kind in {"int8", "int4", "nl4"}:
        parts["values"] = rng.integers(0, 256, total, dtype=np.uint8)
        scales = rng.uniform(0.5, 1.5, (rows, -(-cols // group_size))).astype(np.float32)
        parts["scales"] = (scales.view(np.uint32) >> 16).astype(np.uint16)
    else:
        values = rng.standard_normal(total).astype(np.float32)
        upper = (values.view(np.uint32) >> 16).astype(np.uint16)
        parts["values"] = upper if kind == "bf16" else values.astype(np.float16).view(np.uint16)
    return parts


def size(parts):
    return sum(part.nbytes for part in parts.values())


def copies(kind, shape, group_size, parts, megabytes):
    """Weights of one content in different memory, together at least so many megabytes."""
    number = max(1, -(-megabytes * 10**6 // size(parts)))
    group_size = group_size if kind in {"int8", "int4", "nl4"} else 0
    return [
        NativeWeight(kind, shape, group_size=group_size, **{name: part.copy() for name, part in parts.items()})
        for _ in range(number)
    ]


def measure(weights, bytes_each, n, pool, memory):
    """Return the median seconds of one product, and the median bytes/s of plain reading."""
    rows, cols = weights[0].shape
    x = np.random.default_rng(0).standard_normal((n, cols)).astype(np.float32)
    y = np.empty((n, rows), np.float32)
    library, used = kernels.load_library(), 0
    matmul(weights[0], x, pool)
    products, reads = [], []
    until = time.perf_counter() + SECONDS
    group = max(1, 200_000_000 // bytes_each) if n < 64 else 1
    while time.perf_counter() < until or len(products) < 3:
        started = time.perf_counter()
        for weight in itertools.islice(itertools.cycle(weights), used, used + group):
            library.sct_matmul(pool.handle, ctypes.byref(weight.struct), x.ctypes.data, n, y.ctypes.data)
        products.append((time.perf_counter() - started) / group)
        used = (used + group) % len(weights)
        started = time.perf_counter()
        read_memory(memory, pool)
        reads.append(memory.nbytes / (time.perf_counter() - started))
    return statistics.median(products), statistics.median(reads)


def run(options):
    rng = np.random.default_rng(0)
    memory = np.ones(options.megabytes * 10**6 // 8, np.int64)
    results = []
    print(f"{platform.processor() or platform.machine()}, {options.shape[0]}x{options.shape[1]}, group {options.group}")
    heading = ("kind", "sparsity", "isa", "threads", "n", "ms", "G weights/s", "G MAC/s", "GB/s", "memory GB/s", "part")
    print(" ".join(f"{name:>11}" for name in heading))
    for kind in options.kinds:
        for sparsity in options.sparsity:
            parts = random_parts(rng, kind, options.shape, options.group, sparsity)
            weights = copies(kind, options.shape, options.group, parts, options.megabytes)
            for isa in options.isa or [name for name in kernels.instruction_sets() if name != "reference"]:
                kernels.set_isa(isa)
                for threads in options.threads:
                    pool = Pool(threads)
                    for n in options.batches:
                        seconds, bandwidth = measure(weights, size(parts), n, pool, memory)
                        positions = options.shape[0] * options.shape[1]
                        row = {
                            "kind": kind,
                            "sparsity": sparsity,
                            "isa": isa,
                            "threads": threads,
                            "n": n,
                            "milliseconds": seconds * 1e3,
                            "weights_per_second": positions / seconds,
                            "multiplications_per_second": positions * n / seconds,
                            "bytes_per_second": size(parts) / seconds,
                            "memory_bytes_per_second": bandwidth,
                        }
                        results.append(row)
                        part = row["bytes_per_second"] / bandwidth
                        label = "dense" if sparsity is None else f"{sparsity:.0%}"
                        print(
                            f"{kind:>11} {label:>11} {isa:>11} {threads:>11} {n:>11} {seconds * 1e3:>11.3f} "
                            f"{positions / seconds / 1e9:>11.1f} {positions * n / seconds / 1e9:>11.1f} "
                            f"{row['bytes_per_second'] / 1e9:>11.2f} {bandwidth / 1e9:>11.2f} {part:>11.0%}",
                            flush=True,
                        )
    return results


def numbers(text):
    return [int(part) for part in text.split(",")]


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", type=lambda text: tuple(map(int, text.split("x"))))
    parser.add_argument("--group", default=64, type=int)
    parser.add_argument("--batches", default=[1, 8, 512], type=numbers)
    parser.add_argument("--threads", default=[1, 2], type=numbers)
    parser.add_argument("--kinds", default=["bf16", "int8", "int4"], type=lambda text: text.split(","))
    parser.add_argument("--sparsity", default=[0.5], type=lambda text: [float(part) for part in text.split(",")])
    parser.add_argument("--dense", action="store_true", help="dense weights as well")
    parser.add_argument("--isa", type=lambda text: text.split(","))
    parser.add_argument("--megabytes", default=400, type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.sparsity = [*options.sparsity, *([None] if options.dense else [])]
    return options


def main():
    options = parse(sys.argv[1:])
    results = run(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
