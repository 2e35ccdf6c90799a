"""What rounding to int4 adds to the error of pruned layers, on the calibration's text and on text that it has not seen.

    python benchmarks/rounding_trials.py [MODEL] [--for python] [--samples 32] [--sparsity 0.5] [--blocks 3 12 24]

Each weight is pruned with admm by the Gram matrix of the calibration text and rounded; the figures are the error of its
outputs over that before rounding, on the calibration text and, behind a slash, on other training text. `settled` is
what the tool does; behind it the same with more damping while codes settle, with the scales of a row fitted together to
the settled codes (three rounds), and in groups of 32. The figures are those of docs/results/methods.md.
"""

import argparse
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM
from watching import products, summed_inputs

import secateur
from secateur.calibration.statistics import InputStatistics
from secateur.checkpoint.quantise import CODEBOOKS, Quantised, dequantise, quantise, spread_scales
from secateur.models.source import load_tokenizer, resolve_model
from secateur.pruning import rounding
from secateur.pruning.equalise import column_exponents, louder
from secateur.pruning.layer_problem import LayerProblem, damping_of
from secateur.pruning.masks import Target
from secateur.pruning.methods import METHODS

LINEARS = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
VALUES, OTHER_SEED = "int4", 77


def error(found, weight, gram):
    difference = found.float() - weight.float()
    return float((difference @ gram * difference).sum())


def fitted_together(problem, codes, mask, group_size, rounds=3):
    """Fit all scales of a row to its codes by least squares, settle the codes again, and so on."""
    found = CODEBOOKS[VALUES].numbers(codes.codes).T.contiguous()
    scales, width = codes.scales, len(problem.gram)
    groups = scales.shape[1]
    pad = (0, 0, 0, groups * group_size - width)

    def by_group(values):
        return torch.nn.functional.pad(values, pad).view(groups, group_size, -1).sum(1)

    def steps(some):
        return (spread_scales(some, group_size, width) * problem.norms * mask).T.contiguous()

    for _ in range(rounds):
        values = found * problem.norms[:, None]
        columns = [slice(begin, min(width, begin + group_size)) for begin in range(0, width, group_size)]
        normal = torch.stack([by_group(values * (problem.gram[:, one] @ values[one])).T for one in columns], 2).double()
        wanted = by_group(values * problem.aim.T).T.double() - (normal @ scales.double()[..., None])[..., 0]
        diagonal = normal.diagonal(dim1=1, dim2=2)
        normal += torch.diag_embed(torch.where(diagonal > 0, 1e-4 * diagonal, 1.0))
        scales = (scales.double() + torch.linalg.solve(normal, wanted)).to(torch.bfloat16)
        found = rounding._descend(problem, found, steps(scales), CODEBOOKS[VALUES], 2)
    return Quantised(CODEBOOKS[VALUES].codes(found.T.contiguous()), scales)


def trials(weight, grams, tokens, sparsity, *, equalise):
    """Return {trial: (error on the calibration text, on other text)} over the errors before rounding."""
    statistics = InputStatistics(grams[0].diagonal().clone(), tokens, grams[0])
    if equalise:
        exponents = column_exponents([weight], statistics.loudness(), 64, sparsity)
        scale = torch.exp2(-exponents.float())
        weight, grams = louder(weight, exponents), [gram * scale * scale[:, None] for gram in grams]
        statistics = InputStatistics(grams[0].diagonal().clone(), tokens, grams[0])
    pruned = METHODS.get("admm").function(weight, statistics, Target(sparsity, correction=0.0))
    before = [error(pruned.weight * pruned.mask, weight, gram) for gram in grams]
    problem, damping = LayerProblem.of(weight, statistics, 0.0), damping_of(statistics)

    def shares(codes, group_size):
        found = dequantise(codes, values=VALUES, group_size=group_size)
        return [error(found, weight, gram) / one for gram, one in zip(grams, before, strict=True)]

    def damped(times):
        gram = problem.gram.clone()
        gram.diagonal().fill_(1 + times * damping)
        return replace(problem, gram=gram, aim=problem.dense @ gram)

    def settled(group_size, of=problem):
        near = quantise(pruned.weight, pruned.mask, statistics.loudness(), values=VALUES, group_size=group_size)
        codes = rounding.settle(of, pruned.weight, near, pruned.mask, values=VALUES, group_size=group_size)
        return near, codes

    near, codes = settled(64)
    return {
        "nearest": shares(near, 64),
        "settled": shares(codes, 64),
        "damping x 3": shares(settled(64, damped(3))[1], 64),
        "damping x 10": shares(settled(64, damped(10))[1], 64),
        "scales fitted": shares(fitted_together(problem, codes, pruned.mask, 64), 64),
        "groups of 32": shares(settled(32)[1], 32),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 12, 24])
    options = parser.parse_args()
    folder = resolve_model(options.model)
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    texts = [
        torch.from_numpy(secateur.calibrate(options.domain, tokenizer, samples=options.samples, seed=seed).token_ids)
        for seed in (0, OTHER_SEED)
    ]
    names = [f"model.layers.{block}.{linear}" for block in options.blocks for linear in LINEARS]
    sums = [summed_inputs(model, names, text, products) for text in texts]
    for number, name in enumerate(names):
        weight = model.get_submodule(name).weight.detach().bfloat16()
        grams = [one[name] for one in sums]
        found = trials(weight, grams, texts[0].numel(), options.sparsity, equalise=name.endswith("down_proj"))
        if number == 0:
            print("| | " + " | ".join(found) + " |\n|" + "---|" * (len(found) + 1))
        cells = [" / ".join(f"{share:.3f}" for share in one) for one in found.values()]
        print(f"| {name.removeprefix('model.layers.')} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
