"""Trials on the layers of one block: how many bits, which levels, and whether swaps improve a mask.

    python benchmarks/layer_trials.py [MODEL] [--for python] [--block 10] [--samples 16] [--sparsity 0.5]
                                      [--layers self_attn.q_proj mlp.up_proj mlp.down_proj]

For each layer the error of its outputs on the calibration text over their size, tr((W - V) G (W - V)^T) / tr(V G V^T).
Weights are pruned with admm, scales are one for each 64 inputs, and codes settle by coordinate descent. The inputs of
down projections are made equally loud before they are rounded, as in the tool. What is tried and not in the tool is
written plainly here: levels other than whole numbers, swaps, and DSnoT. The figures are those of docs/results/bits.md.
"""

import argparse

import torch
from watching import products, summed_inputs

import secateur
from secateur.calibration.statistics import InputStatistics
from secateur.checkpoint.quantise import dequantise, quantise
from secateur.models.source import load_tokenizer, resolve_model
from secateur.pruning import rounding
from secateur.pruning.base import Base
from secateur.pruning.equalise import column_exponents, louder
from secateur.pruning.layer_problem import LayerProblem, refit
from secateur.pruning.masks import Target
from secateur.pruning.methods import METHODS

GROUP = 64
WHOLE = {"int4": torch.arange(-8.0, 8.0), "int3": torch.arange(-4.0, 4.0)}
NO_MIDDLE = {f"±({gap} + k), {n} each": (gap, n) for n, gaps in ((8, (1.0, 1.5, 2.0)), (4, (0.5, 1.0))) for gap in gaps}


def error(problem, scaled):
    difference = scaled - problem.dense
    size = (problem.dense @ problem.gram * problem.dense).sum()
    return float((difference @ problem.gram * difference).sum() / size)


def nearest(values, levels):
    return levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]


def fitted_scales(weight, mask, loudness, levels):
    """Scales [out, in] that serve levels best, weights counted by loudness: of some around the largest entry."""
    rows, width = weight.shape
    pad = torch.nn.functional.pad
    entries = pad(weight * mask, (0, -width % GROUP)).view(rows, -1, GROUP)
    counted = pad(loudness.expand(rows, width) * mask, (0, -width % GROUP)).view(entries.shape)
    largest = entries.gather(-1, entries.abs().argmax(-1, keepdim=True)) / levels.abs().max()
    best, best_error = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for factor in (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3):
        for sign in (1, -1):
            scale = sign * factor * largest
            for _ in range(3):
                scale = torch.where(scale == 0, 1.0, scale)
                codes = nearest(entries / scale, levels)
                lost = (counted * (entries - scale * codes).square()).sum(-1, keepdim=True)
                better = lost < best_error
                best, best_error = torch.where(better, scale, best), torch.where(better, lost, best_error)
                size = (counted * codes.square()).sum(-1, keepdim=True).clamp_min(1e-30)
                scale = (counted * entries * codes).sum(-1, keepdim=True) / size
    return best.bfloat16().float().expand(-1, -1, GROUP).reshape(rows, -1)[:, :width]


def settled(problem, codes, scales, mask, levels):
    """Coordinate descent over the levels, plainly: one column after the other, begun from given codes."""
    steps = (scales * problem.norms * mask).T.contiguous()
    codes = codes.T.contiguous()
    residual = (problem.aim.T - problem.gram @ (codes * steps)).contiguous()
    inverse = torch.where(steps != 0, 1 / steps, 0.0) / problem.gram.diagonal()[:, None]
    for _ in range(rounding.SWEEPS):
        for j in range(len(steps)):
            wanted = torch.where(steps[j] != 0, nearest(codes[j] + residual[j] * inverse[j], levels), codes[j])
            residual.addr_(problem.gram[:, j], (wanted - codes[j]) * steps[j], alpha=-1)
            codes[j] = wanted
    return (codes * steps).T


def swapped(problem, found, mask, rounds=60, candidates=24):
    """Exchange the kept and the removed weight of each row that lower its error most, in each of some rounds."""
    gram, diagonal, made = problem.gram, problem.gram.diagonal(), 0
    found, mask = found.clone(), mask.clone()
    residual = problem.aim - found @ gram
    for number in range(1, rounds + 1):
        cost = torch.where(mask, found * (found * diagonal + 2 * residual), torch.inf)
        costs, leaving = cost.topk(candidates, 1, largest=False)
        coming = torch.where(mask, -torch.inf, residual.square() / diagonal).topk(candidates, 1).indices
        moved = found.gather(1, leaving)[:, :, None] * gram[leaving[:, :, None], coming[:, None, :]]
        gains = (residual.gather(1, coming)[:, None, :] + moved).square() / diagonal[coming][:, None, :]
        change, at = (costs[:, :, None] - gains).flatten(1).min(1)
        rows = (change < -1e-7 * problem.dense.square().sum(1)).nonzero().squeeze(1)
        if not len(rows):
            break
        i, j = leaving[rows, at[rows] // candidates], coming[rows, at[rows] % candidates]
        gone = found[rows, i]
        put = (residual[rows, j] + gone * gram[i, j]) / diagonal[j]
        found[rows, i], found[rows, j] = 0.0, put
        mask[rows, i], mask[rows, j] = False, True
        residual[rows] += gone[:, None] * gram[i] - put[:, None] * gram[j]
        made += len(rows)
        if number % 10 == 0:
            found = refit(problem, found, mask, 4)
            residual = problem.aim - found @ gram
    return refit(problem, found, mask, 10), made / len(found)


def dsnot(weight, moments, statistics, sparsity, rounds=50):
    """Wanda's mask after swaps that go by means and variances alone (Zhang et al. 2024, section 3.2), plainly.

    In each round the row's expected error, the sum of W_ij mean(x_j) over removed weights, moves towards 0: of the
    removed weights on its side the one with the largest expected part over its variance comes back, and of the kept
    ones that move it the same way that of Wanda's lowest score goes.
    """
    mean, variance = moments
    mask = METHODS.get("wanda").function(weight, statistics, Target(sparsity)).mask
    score, part = weight.abs() * statistics.sum_squares.sqrt(), weight * mean
    rows, swaps = torch.arange(len(weight)), 0
    for _ in range(rounds):
        expected = (part * ~mask).sum(1)
        towards = part * expected.sign()[:, None]  # what a weight's return takes from the error, its removal adds
        coming = torch.where(mask, -torch.inf, towards / variance).argmax(1)
        leaving = torch.where(mask & (towards < 0), score, torch.inf).argmin(1)
        after = expected - part[rows, coming] + part[rows, leaving]
        moved = rows[after.abs() < expected.abs()]
        if not len(moved):
            break
        mask[moved, coming[moved]], mask[moved, leaving[moved]] = True, False
        swaps += len(moved)
    return mask, swaps / len(weight)


def pruned_by(method, weight, statistics, sparsity):
    found = METHODS.get(method).function(weight, statistics, Target(sparsity))
    return found.weight.float(), found.mask


def level_sets():
    for name, levels in WHOLE.items():
        yield name, levels
    for name, (gap, count) in NO_MIDDLE.items():
        side = gap + torch.arange(float(count))
        yield name, torch.cat([-side.flip(0), side])


def trial_of_bits(weight, statistics, sparsity):
    """Print the error of nearest and settled codes for each set of levels, with and without pruning."""
    for share in (0.0, sparsity):
        exponents = column_exponents([weight], statistics.loudness(), GROUP, share)
        scaled, copy = louder(weight, exponents), InputStatistics(statistics.sum_squares, statistics.n_tokens)
        quiet = InputStatistics(copy.sum_squares, copy.n_tokens, statistics.gram.clone()).quieter(exponents)
        problem = LayerProblem.of(scaled, quiet)
        kept, mask = scaled, torch.ones_like(scaled, dtype=torch.bool)
        if share:
            kept, mask = pruned_by("admm", scaled, quiet, share)
        print(f"  {share:.0%} removed: {error(problem, kept * mask * problem.norms):.5f}")
        codes = quantise(kept, mask, quiet.loudness(), values="int4", group_size=GROUP)
        tool = rounding.settle(problem, kept, codes, mask, values="int4", group_size=GROUP)
        ours = dequantise(tool, values="int4", group_size=GROUP) * problem.norms * mask
        print(f"    int4 as in the tool: {error(problem, ours):.5f}")
        for name, levels in level_sets():
            scales = fitted_scales(kept, mask, quiet.loudness(), levels)
            codes = nearest(kept / scales, levels) * mask
            values = (codes * scales * problem.norms * mask, settled(problem, codes, scales, mask, levels))
            near, far = (error(problem, one) for one in values)
            print(f"    {name}: nearest {near:.5f}, settled {far:.5f}")


def trial_of_swaps(weight, statistics, moments, sparsity):
    """Print the error of masks before and after swaps, values refitted."""
    problem = LayerProblem.of(weight, statistics)
    mask, swaps = dsnot(weight, moments, statistics, sparsity)
    values = problem.dense * mask
    plain, best = error(problem, values), error(problem, refit(problem, values, mask, 10))
    print(f"  wanda, DSnoT: {plain:.5f}, refitted {best:.5f} ({swaps:.1f} swaps in a row)")
    for method in ("wanda", "sparsegpt", "admm"):
        kept, mask = pruned_by(method, weight, statistics, sparsity)
        before = refit(problem, kept * mask * problem.norms, mask, 10)
        after, swaps = swapped(problem, before, mask)
        plain = error(problem, kept * mask * problem.norms)
        print(
            f"  {method}: {plain:.5f}, refitted {error(problem, before):.5f}, swapped {error(problem, after):.5f} "
            f"({swaps:.1f} in a row)"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--layers", nargs="+", default=["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
    options = parser.parse_args()
    folder = resolve_model(options.model)
    base = Base.open(folder)
    calibration = secateur.calibrate(options.domain, load_tokenizer(folder), samples=options.samples)
    model = base.loaded(base.tensors(torch.device("cpu"))).float()
    names = [f"{base.blocks[options.block].name}.{layer}" for layer in options.layers]
    token_ids = torch.from_numpy(calibration.token_ids)
    sums = summed_inputs(model, names, token_ids, lambda inputs: inputs.flatten(0, -2).double().sum(0))
    squares = summed_inputs(model, names, token_ids, lambda inputs: inputs.flatten(0, -2).double().square().sum(0))
    with torch.inference_mode():
        for name, gram in summed_inputs(model, names, token_ids, products).items():
            weight = model.get_parameter(f"{name}.weight").data
            statistics = InputStatistics(gram.diagonal().clone(), token_ids.numel(), gram)
            print(f"{name} {list(weight.shape)}", flush=True)
            trial_of_bits(weight, statistics, options.sparsity)
            mean = sums[name] / token_ids.numel()
            variance = squares[name] / token_ids.numel() - mean.square()
            trial_of_swaps(weight, statistics, (mean.float(), variance.float()), options.sparsity)


if __name__ == "__main__":
    main()
