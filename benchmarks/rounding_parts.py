"""What each part of a model loses when it alone is rounded to four bits: which weights `--eight-bits` would take.

    python benchmarks/rounding_parts.py [MODEL] [--for python] [--values nl4] [--group-size 32] [--samples 64]
                                        [--method admm]

Each attention and each MLP is rounded alone, as the tool does it to choose (nearest codes, errors weighed by how loud
inputs are), and the divergence of the model's next-token probabilities is measured on 2,048 tokens of the calibration
text. Of the sum of all, the table gives the share that goes away when a share of the weights has eight bits instead.

With `--method` the same parts are also taken from a sub-model whose codes make up for each other, derived with
`--no-propagate` and nothing removed, so that each can be put into the parent alone, with the norm before it: what is
really lost. The last column is then how much of that goes away by the choice that is made without it, and in brackets
by the best one.
"""

import argparse
import math
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from secateur.calibration.mixture import parse_mixture
from secateur.calibration.packing import build_calibration_set
from secateur.checkpoint.format import Encoding
from secateur.models.products import fast_products
from secateur.models.source import load_tokenizer, resolve_model
from secateur.pruning.allotment import rounded_by_loudness
from secateur.pruning.base import Base
from secateur.pruning.budgets import worth_most
from secateur.pruning.derive import derive
from secateur.pruning.divergence import TOKENS, mean_divergence, measure_divergence, spread_logits

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def really_lost(folder, text, options, parts):
    """Return what the parent loses with each part of a sub-model alone, by the names of its weights."""
    with tempfile.TemporaryDirectory() as place:
        settings = {"values": options.values, "group_size": options.group_size, "sparsity": 0.0, "correction": 0.0}
        sub = derive(folder, text, output=Path(place) / "sub", method=options.method, propagate=False, **settings)
        theirs = AutoModelForCausalLM.from_pretrained(sub.path, dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    ours, token_ids = model.state_dict(), torch.from_numpy(text.token_ids)
    token_ids = token_ids[: TOKENS // token_ids.shape[1]]
    found = {}
    with torch.inference_mode():
        parent = spread_logits(model, token_ids)
        for names in parts:
            block = names[0].partition(".layers.")[2].partition(".")[0]
            norm = "input_layernorm" if "attn" in names[0] else "post_attention_layernorm"
            swapped = [*names, f"model.layers.{block}.{norm}.weight"]
            kept = {name: ours[name].clone() for name in swapped}
            for name in swapped:
                ours[name].copy_(theirs[name])
            found[names] = mean_divergence(parent, spread_logits(model, token_ids))
            for name in swapped:
                ours[name].copy_(kept[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--values", default="nl4")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--method")
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
    real = really_lost(folder, text, options, found) if options.method else found
    if options.method:
        print(f"with {options.method} they lose {sum(real.values()):.4f} nats\n")

    def saved(by, share):
        chosen = worth_most(by, entries, share)
        return sum(real[names] for names in real if chosen.issuperset(names)) / sum(real.values())

    print("| share of the weights | of the loss | of the real loss |\n|---|---|---|")
    for share in SHARES:
        alone = sum(one for names, one in found.items() if worth_most(found, entries, share).issuperset(names)) / lost
        print(f"| {share:.0%} | {alone:.1%} | {saved(found, share):.1%} ({saved(real, share):.1%}) |", flush=True)


if __name__ == "__main__":
    main()
