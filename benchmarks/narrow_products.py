"""What float32 products save on a processor without instructions for bfloat16: one decoder block, with and without.

    python benchmarks/narrow_products.py [MODEL] [--tokens 2048] [--rounds 5] [--threads N]

The block runs alternately as torch runs it and inside `fast_products`; medians, lowest and highest of the rounds.
"""

import argparse
import platform
import statistics
import time

import torch

from secateur.models.products import fast_products, has_units
from secateur.models.replay import record_inputs, run_block
from secateur.models.source import resolve_model
from secateur.pruning.base import Base

LENGTH = 512


def seconds(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    base = Base.open(resolve_model(options.model))
    model = base.loaded(base.tensors(torch.device("cpu")))
    token_ids = torch.randint(0, model.config.vocab_size, (max(1, options.tokens // LENGTH), LENGTH))
    received, times = [], {"plain": [], "float32 products": []}
    with torch.inference_mode():
        calls = record_inputs(
            model, base.blocks, token_ids, len(token_ids), lambda _, hidden: received.append(hidden), model.device
        )
        block, call = model.get_submodule(base.blocks[0].name), calls.get(0, 0)

        def run():
            run_block(block, received[0], call)

        run()
        for _ in range(options.rounds):
            times["plain"].append(seconds(run))
            with fast_products():
                times["float32 products"].append(seconds(run))
    units = "with" if has_units(base.dtype()) else "without"
    print(
        f"{base.folder.name}, {base.dtype()}, {platform.machine()} {units} units for it, "
        f"{torch.get_num_threads()} threads, {token_ids.numel()} tokens"
    )
    for name, found in times.items():
        print(f"{name}: {statistics.median(found):.3f} s ({min(found):.3f}, {max(found):.3f})")
    print(f"ratio {statistics.median(times['plain']) / statistics.median(times['float32 products']):.2f}")


if __name__ == "__main__":
    main()
