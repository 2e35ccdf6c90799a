"""What deriving costs: its wall time over two bare forward passes of the blocks, and its peak memory.

    python benchmarks/derive_cost.py demo path/to/qwen.gguf [--samples 32] [--rounds 3]

For each model, rounds of one derivation (Wanda, 50%, the whole of `secateur.derive`: reading, hashing, pruning,
writing) and two passes of the same tokens through the dense blocks in the same precision and batches, alternating in
one process. Each round's derivation runs in the same process; memory is taken from a process of its own.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.models.source import load_tokenizer, resolve_model
from secateur.pruning.job import TOKENS_PER_BATCH


def calibration_set(folder, samples):
    return secateur.calibrate("python", load_tokenizer(folder), samples=samples, sequence_length=512, seed=0)


def seconds_of_derive(folder, calibration):
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        submodel = secateur.derive(folder, calibration, method="wanda", output=Path(scratch) / "sub")
        return time.perf_counter() - started, submodel.log


def seconds_of_two_passes(model, token_ids):
    batch = max(1, TOKENS_PER_BATCH // token_ids.shape[1])
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(2):
            for part in token_ids.split(batch):
                model.get_decoder()(part, use_cache=False)
    return time.perf_counter() - started


MEMORY_SCRIPT = """
import json, pathlib, sys, tempfile
import psutil, secateur, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from secateur.resources import peak_memory
from secateur.models.source import load_tokenizer, resolve_model
from secateur.pruning.derive import derive
imports = psutil.Process().memory_info().rss
folder = resolve_model(sys.argv[1])
calibration = secateur.calibrate("python", load_tokenizer(folder), samples=int(sys.argv[2]), sequence_length=512)
with tempfile.TemporaryDirectory() as scratch:
    derive(folder, calibration, output=pathlib.Path(scratch) / "sub")
print(json.dumps(peak_memory() - imports))
"""


def memory_of_derive(name, samples):
    """Peak memory of a fresh process above what it had after its imports: tokenizer and corpus count as well."""
    command = [sys.executable, "-c", MEMORY_SCRIPT, name, str(samples)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(name, samples, rounds, memory):
    folder = resolve_model(name)
    calibration = calibration_set(folder, samples)
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype="auto").eval()
    token_ids = torch.from_numpy(calibration.token_ids)
    seconds_of_two_passes(model, token_ids[:4])
    rows = []
    for _ in range(rounds):
        derive_seconds, stages = seconds_of_derive(folder, calibration)
        pass_seconds = seconds_of_two_passes(model, token_ids)
        rows.append({"derive": derive_seconds, "two_passes": pass_seconds, "ratio": derive_seconds / pass_seconds})
        print(json.dumps({**rows[-1], "stages": stages["seconds_by_stage"]}), file=sys.stderr)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    activations = token_ids.numel() * model.config.hidden_size * model.dtype.itemsize
    return {
        "model": folder.name,
        "weights": {path.name: path.stat().st_size for path in folder.weight_files()},
        "tokens": list(token_ids.shape),
        "median_ratio": statistics.median(row["ratio"] for row in rows),
        "rounds": rows,
        "peak_memory_above_imports": memory,
        "allowed_memory": 2 * parameters + activations,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    memory = {name: memory_of_derive(name, options.samples) for name in options.models}
    results = [measure(name, options.samples, options.rounds, memory[name]) for name in options.models]
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"machine": machine, "results": results}, indent=2))
    for result in results:
        memory, allowed = result["peak_memory_above_imports"] / 1e6, result["allowed_memory"] / 1e6
        print(
            f"{result['model']}: derive / two passes = {result['median_ratio']:.2f}; "
            f"peak memory above the imports {memory:.0f} MB (model in bf16 + activations: {allowed:.0f} MB)"
        )


if __name__ == "__main__":
    main()
