"""Held-out perplexity of domain sub-models: domain x sub-model, with standard errors and the spread over seeds.

    python benchmarks/domain_table.py MODEL -o OUT [--data DIR] [--limit 16000] [--samples 32] [--sparsity 0.5]

Derives one sub-model for each of python, java, cpp, javascript and general with the first seed, and python and general
(or what --reseed names) with the others; measures the parent and each sub-model on the same held-out windows of all
five domains. What is finished in OUT is used again, so an interrupted run goes on. Writes OUT/table.json and prints
the tables.

Differences between sub-models are paired: the error is that of the difference within each document. The text that a
sub-model is measured on is from other files than any it was calibrated on.
"""

import argparse
import json
import math
import platform
import shutil
from pathlib import Path

import torch

import secateur
from secateur.config import make_recipe
from secateur.evaluation.statistics import ratio_difference
from secateur.models.source import resolve_model
from secateur.pruning.derive import derive_recipe

DOMAINS = ("python", "java", "cpp", "javascript", "general")


def sub_models(options):
    first, *others = options.seeds
    return [(domain, first) for domain in DOMAINS] + [(domain, seed) for seed in others for domain in options.reseed]


def documents_of(evaluation, model):
    """Return {domain: {document: (nats, tokens)}} of one measured model."""
    measured = {}
    for domain in DOMAINS:
        result = evaluation.cell(f"perplexity:{domain}", model).result
        measured[domain] = {one.document: (one.nats, one.tokens) for one in result.documents}
    return measured


def settings_of(options):
    """What the cached losses depend on; the output folder and the seeds are in the names."""
    return {key: str(getattr(options, key)) for key in ("model", "data", "limit", "samples", "sparsity", "method")}


def measure(options, model, cache):
    """Return the losses of one model, from the cache where it was made with the same options."""
    if not cache.exists():
        tasks = [f"perplexity:{domain}" for domain in DOMAINS]
        evaluation = secateur.evaluate([model], tasks, limit=options.limit, data=options.data)
        losses = documents_of(evaluation, evaluation.models[0].name)
        cache.write_text(json.dumps({"settings": settings_of(options), "losses": losses}))
    cached = json.loads(cache.read_text())
    if cached["settings"] != settings_of(options):
        raise SystemExit(f"{cache} was made with other options ({cached['settings']}): name another folder")
    return cached["losses"]


def derive_and_measure(options, domain, seed):
    name = f"{domain}-{seed}"
    folder, cache = options.output / name, options.output / f"{name}.losses.json"
    if not cache.exists():
        values = {"model": options.model, "for": domain, "sparsity": options.sparsity, "method": options.method}
        recipe = make_recipe({**values, "samples": options.samples, "seed": seed})
        submodel = derive_recipe(recipe, output=folder, data=options.data, resume=True)
        print(f"{name}: derived in {submodel.log.get('seconds', '-')} s", flush=True)
    losses = measure(options, folder, cache)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return losses


def difference(losses, other, domain):
    """ln perplexity of one model minus that of another, paired over documents."""
    names = sorted(losses[domain])
    columns = [[model[domain][name][part] for name in names] for model in (losses, other) for part in (0, 1)]
    return ratio_difference(*columns)


def perplexity(losses, domain):
    nats, tokens = (sum(one[part] for one in losses[domain].values()) for part in (0, 1))
    return math.exp(nats / tokens)


def print_tables(parent, measured, first, reseeded):
    heads = [f"{domain}-{seed}" for domain, seed in measured]
    print("\nheld-out perplexity (columns: parent, then sub-models by calibration domain and seed)")
    print("".join(f"{text:>14}" for text in ["", "parent", *heads]))
    for domain in DOMAINS:
        values = [perplexity(parent, domain), *(perplexity(losses, domain) for losses in measured.values())]
        print(f"{domain:>14}" + "".join(f"{value:>14.3f}" for value in values))
    print(f"\nperplexity over that of the domain's own sub-model (seed {first}), paired 95% interval; below 1 beats it")
    print("".join(f"{text:>26}" for text in ["", *DOMAINS]))
    for domain in DOMAINS:
        own = measured[domain, first]
        cells = []
        for other in DOMAINS:
            gap = difference(measured[other, first], own, domain)
            cells.append(f"{math.exp(gap.value):.3f} [{math.exp(gap.low):.3f}, {math.exp(gap.high):.3f}]")
        print(f"{domain:>26}" + "".join(f"{cell:>26}" for cell in cells))
    print("\nspread over seeds: lowest and highest perplexity (rows: text, columns: calibration)")
    print("".join(f"{text:>26}" for text in ["", *reseeded]))
    for domain in DOMAINS:
        spreads = [
            [perplexity(losses, domain) for (calibrated, _), losses in measured.items() if calibrated == column]
            for column in reseeded
        ]
        print(f"{domain:>26}" + "".join(f"{f'{min(one):.3f} - {max(one):.3f}':>26}" for one in spreads))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=16000, help="tokens of each domain")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reseed", nargs="+", default=["python", "general"], help="domains that get every seed")
    parser.add_argument("--keep", action="store_true", help="keep the sub-models")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    parent = measure(options, resolve_model(options.model).path, options.output / "parent.losses.json")
    measured = {one: derive_and_measure(options, *one) for one in sub_models(options)}
    first = options.seeds[0]
    table = {
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "options": {key: str(value) for key, value in vars(options).items()},
        "documents": {domain: len(parent[domain]) for domain in DOMAINS},
        "perplexity": {
            name: {domain: perplexity(losses, domain) for domain in DOMAINS}
            for name, losses in [("parent", parent), *((f"{d}-{s}", one) for (d, s), one in measured.items())]
        },
    }
    (options.output / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    print_tables(parent, measured, first, options.reseed)


if __name__ == "__main__":
    main()
