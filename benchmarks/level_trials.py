"""Sixteen levels that are not evenly spaced: what int4 would lose with them, nothing removed and after pruning.

    python benchmarks/level_trials.py [MODEL] [--for python] [--samples 16] [--sparsity 0.5] [--group-size 64]

Each weight is pruned with admm (at a sparsity of 0 it is only rounded) and its codes settle as in the tool: column by
column (GPTQ), then by coordinate descent. `even` is -8..7, the levels of int4; `iq4_nl` those of llama.cpp's type of
that name, which nl4 has; `fitted` those that serve the weights of all the layers best (Lloyd's iteration, each weight
counted by how loud its input is). Printed are errors of the layer's outputs, on the calibration text and, behind a
slash, on other training text: over the error before rounding, or over the outputs' size where nothing was removed.
"""

import argparse

import torch
from rounding_trials import OTHER_SEED, error
from transformers import AutoModelForCausalLM
from watching import products, summed_inputs

import secateur
from secateur.calibration.statistics import InputStatistics
from secateur.checkpoint.quantise import CODEBOOKS
from secateur.models.source import load_tokenizer, resolve_model
from secateur.pruning.equalise import column_exponents, louder
from secateur.pruning.layer_problem import LayerProblem
from secateur.pruning.masks import Target
from secateur.pruning.methods import METHODS

LINEARS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
EVEN, IQ4_NL = torch.arange(-8.0, 8.0), torch.tensor(CODEBOOKS["nl4"].levels).float()
PEAKS = (0.8, 0.9, 1.0, 1.06, 1.15)  # where the outermost level is put, of the largest weight of a group
BLOCK, SWEEPS = 128, 4


def nearest(values, levels):
    return levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]


def by_group(values, group_size):
    """Return [rows, groups, group_size] of [rows, columns], filled up with zeros."""
    groups = -(-values.shape[1] // group_size)
    padded = torch.nn.functional.pad(values, (0, groups * group_size - values.shape[1]))
    return padded.view(len(values), groups, group_size)


def peaks(groups):
    """Return the largest entry of each group with its sign, [rows, groups, 1]."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))


def search_scales(weight, mask, loudness, levels, group_size):
    """Return the scales [rows, groups] that lose least with nearest levels, each fitted by least squares."""
    groups, kept = by_group(weight * mask, group_size), by_group(mask.float(), group_size)
    loud = by_group(loudness[None], group_size) * kept
    least, best = torch.full_like(peaks(groups), float("inf")), torch.ones_like(peaks(groups))
    for peak in PEAKS:
        for top in (levels.max(), levels.min()):
            scale = torch.where(peaks(groups) == 0, 1.0, peaks(groups) / (top * peak))
            for _ in range(2):
                codes = nearest(groups / scale, levels) * kept
                size = (loud * codes.square()).sum(-1, keepdim=True)
                fitted = ((loud * codes * groups).sum(-1, keepdim=True) / size.clamp_min(1e-30)).bfloat16().float()
                scale = torch.where(fitted.abs() < 1e-12, scale, fitted)
            lost = (loud * (groups - nearest(groups / scale, levels) * kept * scale).square()).sum(-1, keepdim=True)
            best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return best[..., 0]


def settled(problem, layer, scales, levels, group_size):
    """Return the weight with codes that make up for each other, as `secateur.pruning.rounding` finds them."""
    width, gram, upper = len(problem.gram), problem.gram, problem.factor()
    spread = scales.repeat_interleave(group_size, 1)[:, :width]
    kept = layer["mask"].T.float().contiguous()
    steps = (spread * problem.norms).T.contiguous() * kept
    inverse = torch.where(steps != 0, 1 / torch.where(steps != 0, steps, 1.0), 0.0)
    begin, codes = (layer["pruned"] * problem.norms).T.contiguous() * kept, torch.zeros_like(steps)
    for first in range(0, width, BLOCK):
        last = min(width, first + BLOCK)
        here, errors = begin[first:last], torch.empty_like(begin[first:last])
        for j in range(first, last):
            codes[j] = nearest(here[j - first] * inverse[j], levels) * kept[j]
            errors[j - first] = (here[j - first] - codes[j] * steps[j]) / upper[j, j]
            here[j + 1 - first :].addr_(upper[j, j + 1 : last], errors[j - first], alpha=-1)
        begin[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    residual = (problem.aim - (codes * steps).T @ gram).T.contiguous()
    for _ in range(SWEEPS):
        for first in range(0, width, BLOCK):
            last = min(width, first + BLOCK)
            here, moves = residual[first:last].clone(), torch.empty_like(residual[first:last])
            for j in range(first, last):
                wanted = nearest(codes[j] + here[j - first] * inverse[j] / gram[j, j], levels) * kept[j]
                moves[j - first], codes[j] = (wanted - codes[j]) * steps[j], wanted
                here[j + 1 - first :].addr_(gram[j, j + 1 : last], moves[j - first], alpha=-1)
            residual.addmm_(gram[first:last].T, moves, alpha=-1)
    return codes.T * spread


def fitted_levels(layers, group_size, rounds=80):
    """Return sixteen levels, from -1 to 1: of weights over their group's largest."""
    entries, loudness = [], []
    for layer in layers:
        groups, kept = by_group(layer["pruned"] * layer["mask"], group_size), by_group(layer["mask"], group_size)
        peak = torch.where(peaks(groups) == 0, 1.0, peaks(groups))
        loud = by_group(layer["statistics"].loudness()[None], group_size) * peak.square()
        entries.append((groups / peak)[kept])
        loudness.append(loud[kept] / loud[kept].mean())
    values, weights = torch.cat(entries), torch.cat(loudness)
    levels = torch.cat([torch.linspace(-0.9, -0.2, 7), torch.linspace(-0.1, 1, 9)])
    for _ in range(rounds):
        places = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
        sums, sizes = (torch.zeros(16).index_add_(0, places, one) for one in (weights * values, weights))
        levels = torch.where(sizes > 0, sums / sizes.clamp_min(1e-30), levels)
    return levels


def prepared(weight, grams, tokens, options, *, equalise):
    """Prune one weight; return it with what it was pruned by."""
    statistics = InputStatistics(grams[0].diagonal().clone(), tokens, grams[0])
    if equalise:
        exponents = column_exponents([weight], statistics.loudness(), options.group_size, options.sparsity)
        scale = torch.exp2(-exponents.float())
        weight, grams = louder(weight, exponents), [gram * scale * scale[:, None] for gram in grams]
        statistics = InputStatistics(grams[0].diagonal().clone(), tokens, grams[0])
    found, mask = weight, torch.ones_like(weight, dtype=torch.bool)
    if options.sparsity:
        pruned = METHODS.get("admm").function(weight, statistics, Target(options.sparsity, correction=0.0))
        found, mask = pruned.weight.float(), pruned.mask
    nothing = found * mask if options.sparsity else torch.zeros_like(weight)
    before = [error(nothing, weight, gram) for gram in grams]
    return {"weight": weight, "pruned": found, "mask": mask, "grams": grams, "statistics": statistics, "before": before}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 12, 24])
    options = parser.parse_args()
    folder = resolve_model(options.model)
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    names = [f"model.layers.{block}.{linear}" for block in options.blocks for linear in LINEARS]
    texts = [
        secateur.calibrate(options.domain, load_tokenizer(folder), samples=options.samples, seed=seed).token_ids
        for seed in (0, OTHER_SEED)
    ]
    sums = [summed_inputs(model, names, torch.from_numpy(text), products) for text in texts]
    layers = [
        prepared(
            model.get_submodule(name).weight.detach().float(),
            [one[name] for one in sums],
            texts[0].size,
            options,
            equalise="down" in name,
        )
        for name in names
    ]
    kinds = {"even": EVEN, "iq4_nl": IQ4_NL, "fitted": fitted_levels(layers, options.group_size)}
    print("fitted:", [round(float(level / kinds["fitted"].abs().max() * 64), 1) for level in kinds["fitted"]])
    print("| | " + " | ".join(kinds) + " |\n|" + "---|" * (len(kinds) + 1))
    for name, layer in zip(names, layers, strict=True):
        problem, cells = LayerProblem.of(layer["weight"], layer["statistics"], 0.0), []
        for levels in kinds.values():
            pruned, mask, loudness = layer["pruned"], layer["mask"], layer["statistics"].loudness()
            scales = search_scales(pruned, mask, loudness, levels, options.group_size)
            found = settled(problem, layer, scales, levels, options.group_size)
            pairs = zip(layer["grams"], layer["before"], strict=True)
            cells.append(" / ".join(f"{error(found, layer['weight'], gram) / one:.4f}" for gram, one in pairs))
        print(f"| {name.removeprefix('model.layers.')} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
