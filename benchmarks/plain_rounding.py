"""What four bits cost on top of pruning when each weight is just rounded, without anything that makes up for it.

    python benchmarks/plain_rounding.py MODEL -o OUT [--for python] [--sparsity 0.5] [--samples 64] [--preset best] \\
        [--values int4:64 nl4:64 nl4:32]

A sub-model with the parent's own values is derived into OUT/sub (used again when it is there). Then each of its pruned
weights is rounded to the nearest codes, with the scale of each group that leaves the smallest squared error of the
weights, and the whole is measured on held-out text. What the tool does instead is the variant `best+int4` of
methods_table.py: inputs made equally loud, codes that make up for each other, layer after layer.
"""

import argparse
from pathlib import Path

import torch

import secateur
from secateur.calibration.held_out import held_out_windows
from secateur.checkpoint.quantise import dequantise, quantise
from secateur.config import make_recipe
from secateur.evaluation.perplexity import evaluate_perplexity
from secateur.models.source import load_tokenizer, resolve_model
from secateur.models.structure import find_blocks
from secateur.pruning.derive import derive_recipe
from secateur.runtime.loading import open_model


def pruned_weights(model):
    """Give the weights that were pruned."""
    for block in find_blocks(model):
        for name in block.prunable:
            yield model.get_submodule(f"{block.name}.{name}").weight


@torch.no_grad()
def rounded(weight, values, group_size):
    codes = quantise(weight.float(), weight != 0, None, values=values, group_size=group_size)
    return dequantise(codes, values=values, group_size=group_size).to(weight.dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--preset", default="best")
    parser.add_argument("--values", nargs="+", default=["int4:64", "nl4:64", "nl4:32"])
    parser.add_argument("--limit", type=int, default=8000, help="tokens of held-out text")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    names = ("model", "sparsity", "samples", "preset")
    recipe = make_recipe({"for": options.domain, **{name: getattr(options, name) for name in names}})
    folder = options.output / "sub"
    derive_recipe(recipe, output=folder, data=options.data, resume=True)
    windows = held_out_windows(
        options.domain, load_tokenizer(resolve_model(options.model)), max_tokens=options.limit, data=options.data
    )

    def perplexity(model):
        return evaluate_perplexity(model, windows, options.domain).perplexity

    pruned = open_model(resolve_model(str(folder)))
    before = perplexity(pruned)
    print(f"{secateur.__version__}, {folder}: {before:.3f} with the parent's own values", flush=True)
    kept = [weight.detach().clone() for weight in pruned_weights(pruned)]
    for entry in options.values:
        values, _, group_size = entry.partition(":")
        for weight, own in zip(pruned_weights(pruned), kept, strict=True):
            weight.data.copy_(rounded(own, values, int(group_size)))
        found = perplexity(pruned)
        print(f"{values} in groups of {group_size}, nearest: {found:.3f}, {found / before - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()
