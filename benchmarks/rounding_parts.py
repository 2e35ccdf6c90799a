"""What each part of a model loses when it alone is rounded to four bits: which weights `--eight-bits` would take.

    python benchmarks/rounding_parts.py [MODEL] [--for python] [--values nl4] [--group-size 32] [--samples 64]

Each attention and each MLP is rounded alone, as the tool does it to choose (nearest codes, errors weighed by how loud
inputs are), and the divergence of the model's next-token probabilities is measured on 2,048 tokens of the calibration
text. Of the sum of all, the table gives the share that goes away when a share of the weights has eight bits instead.
"""

import argparse
import math
from functools import partial

import torch

from secateur.calibration.mixture import parse_mixture
from secateur.calibration.packing import build_calibration_set
from secateur.checkpoint.format import Encoding
from secateur.models.products import fast_products
from secateur.models.source import load_tokenizer, resolve_model
from secateur.pruning.allotment import rounded_by_loudness
from secateur.pruning.base import Base
from secateur.pruning.budgets import worth_most
from secateur.pruning.divergence import measure_divergence

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--values", default="nl4")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    folder = resolve_model(options.model)
    base, tokenizer = Base.open(folder), load_tokenizer(folder)
    text = build_calibration_set(
        parse_mixture((options.domain,)), tokenizer, samples=options.samples, sequence_length=512, seed=0
    )
    change = partial(rounded_by_loudness, encoding=Encoding(options.values, options.group_size))
    model = base.loaded(base.tensors(torch.device("cpu")))
    with fast_products():
        found = measure_divergence(model, base.blocks, torch.from_numpy(text.token_ids), change, 100.0, lambda *_: None)
    shapes = base.shapes()
    entries = {name: math.prod(shape) for name, shape in shapes.items()}
    lost, total = sum(found.values()), sum(entries.values())
    print(f"{folder.name}: parts alone lose {lost:.4f} nats together\n")
    attention = [names for names in found if len(names) > 1 and "attn" in names[0]]
    share = sum(entries[name] for names in attention for name in names) / total
    print(f"attention: {share:.1%} of the weights, {sum(map(found.__getitem__, attention)) / lost:.1%} of the loss\n")
    print("| share of the weights | of the loss |\n|---|---|")
    for share in SHARES:
        chosen = worth_most(found, entries, share)
        whole = sum(one for names, one in found.items() if chosen.issuperset(names))
        print(f"| {share:.0%} | {whole / lost:.1%} |", flush=True)


if __name__ == "__main__":
    main()
