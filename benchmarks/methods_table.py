"""What methods keep: loss, share of Wanda's loss that is closed, and cost, over seeds, sparsities and domains.

    python benchmarks/methods_table.py MODEL -o OUT [--for python java] [--sparsity 0.5 0.6] [--seeds 0 1 2] \\
        [--variants wanda admm admm+int4 admm+recover=327680] [--samples 64] [--limit 8000]

A variant is a method or a preset and, behind plus signs, `int8`, `int4` or `recover=TOKENS`. Each is derived for each
domain, sparsity and seed, and measured on held-out text of all the domains and plain English. What is finished in OUT
is used again, so an interrupted run goes on. Writes OUT/NAME.json for each sub-model and prints the table, with the
lowest and highest seed:

    loss     ln(perplexity / that of the parent), of the sub-model's own domain
    closed   (ln wanda - ln this) / (ln wanda - ln parent), of the same seed
    other    perplexity over the parent's, of the other domains and of plain English
"""

import argparse
import math
import platform
import shutil
from pathlib import Path

import torch
from caching import cached

import secateur
from secateur.checkpoint.format import LOG, read_json
from secateur.config import PRESETS, make_recipe
from secateur.models.source import resolve_model
from secateur.pruning.derive import derive_recipe


def recipe_of(options, variant, domain, sparsity, seed):
    method, *extras = variant.split("+")
    kind = "preset" if method in PRESETS else "method"
    chosen = {"model": options.model, "for": domain, kind: method, "sparsity": sparsity, "seed": seed}
    for extra in extras:
        key, _, value = extra.partition("=")
        chosen |= {key: int(value)} if value else {"values": key}
    return make_recipe({**chosen, "samples": options.samples})


def measured(options, model):
    """Return {domain: perplexity} on held-out text."""
    tasks = [f"perplexity:{domain}" for domain in options.measured]
    evaluation = secateur.evaluate([model], tasks, limit=options.limit, data=options.data)
    name = evaluation.models[0].name
    return {domain: evaluation.cell(f"perplexity:{domain}", name).result.perplexity for domain in options.measured}


def measured_once(options, name, settings, make):
    """Return what `make` gives, from OUT where it was made with the same settings and options."""
    common = {key: getattr(options, key) for key in ("model", "limit", "measured")}
    return cached(options.output / f"{name}.json", {**settings, **common, "data": str(options.data)}, make)


def sub_model(options, variant, domain, sparsity, seed):
    name = f"{domain.replace('/', '_')}-{sparsity}-{seed}-{variant}"
    recipe = recipe_of(options, variant, domain, sparsity, seed)

    def make():
        folder = options.output / name
        derive_recipe(recipe, output=folder, data=options.data, resume=True)
        found = {"perplexity": measured(options, folder), "log": read_json(folder / LOG)}
        if not options.keep:
            shutil.rmtree(folder)
        print(f"{name}: {found['log']['seconds']} s, {found['perplexity']}", flush=True)
        return found

    return measured_once(options, name, {"recipe": recipe.to_dict()}, make)


def span(values, form):
    """Return the mean and, of more than one seed, the lowest and highest."""
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))}, {form.format(max(values))})"


def row(options, parent, results, variant):
    """Return the cells of a variant's results by seed."""
    domain, sparsity = results["domain"], results["sparsity"]
    own = {seed: math.log(one["perplexity"][domain]) for seed, one in results[variant].items()}
    dense = math.log(parent[domain])
    cells = [domain, f"{sparsity:.0%}", variant, span([math.exp(value) for value in own.values()], "{:.2f}")]
    cells.append(span([value - dense for value in own.values()], "{:.3f}"))
    if "wanda" in results:
        wanda = {seed: math.log(one["perplexity"][domain]) for seed, one in results["wanda"].items()}
        cells.append(span([(wanda[seed] - own[seed]) / (wanda[seed] - dense) for seed in own], "{:.2f}"))
    else:
        cells.append("")
    for other in options.measured:
        ratios = [one["perplexity"][other] / parent[other] for one in results[variant].values()]
        cells.append(span(ratios, "{:.2f}"))
    seconds = [one["log"]["seconds"] for one in results[variant].values() if not one["log"]["resumed"]]
    cells.append(span(seconds, "{:.0f}") if seconds else "")
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--for", dest="domains", nargs="+", default=["python", "java"])
    parser.add_argument("--variants", nargs="+", default=["wanda", "admm"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--limit", type=int, default=8000, help="tokens of held-out text of each domain")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the sub-models")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.measured = sorted({*options.domains, "python", "java", "general"})
    folder = resolve_model(options.model)
    print(f"{folder.name}, {platform.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    parent = measured_once(options, "parent", {}, lambda: {"perplexity": measured(options, options.model)})[
        "perplexity"
    ]
    print("parent:", parent, flush=True)
    rows = [["for", "sparsity", "variant", "perplexity", "loss", "closed", *options.measured, "seconds"]]
    for sparsity in options.sparsity:
        for domain in options.domains:
            results = {"domain": domain, "sparsity": sparsity}
            for variant in options.variants:
                runs = {seed: sub_model(options, variant, domain, sparsity, seed) for seed in options.seeds}
                results[variant] = runs
            rows += [row(options, parent, results, variant) for variant in options.variants]
    print()
    for number, cells in enumerate(rows):
        print("| " + " | ".join(cells) + " |")
        if number == 0:
            print("|" + "---|" * len(cells))


if __name__ == "__main__":
    main()
