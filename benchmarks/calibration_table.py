"""What calibration text is best: how much, how long, which mixture, and whether the parent should write it itself.

    python benchmarks/calibration_table.py MODEL -o OUT [--for python] [--sparsity 0.5] [--preset balanced] \\
        [--seeds 0] [--rows python python:128x512 python=0.8,general=0.2 python=0.5,own=0.5 python=0.5,answers=0.5 ...]

A row is a mixture of domains, with `SAMPLESxLENGTH` behind a colon where that is not 64x512. The domains `own`,
`answers` and `functions` are written by the parent itself before anything is measured (`written_text.py`). Each row is
derived for each seed and measured on held-out text of the domain, of other code and of plain English: on other
documents than those that are reported elsewhere, because a default may be chosen by it. What is finished in OUT is used
again. Prints perplexities over the parent's, with the lowest and highest seed.
"""

import argparse
import shutil
from pathlib import Path

from caching import cached
from methods_table import span
from written_text import KINDS, write_text

import secateur
from secateur.calibration.held_out import held_out_windows
from secateur.checkpoint.format import LOG, read_json
from secateur.config import make_recipe
from secateur.evaluation.perplexity import summarise
from secateur.models.source import load_tokenizer, resolve_model
from secateur.pruning.derive import derive_recipe

ROWS = (
    "python",
    "python:16x512",
    "python:128x512",
    "python:16x2048",
    "python:256x128",
    "general",
    "python=0.8,general=0.2",
    "python=0.8,java=0.1,javascript=0.1",
    "python=0.5,own=0.5",
    "own",
    "python=0.5,answers=0.5",
    "python=0.5,functions=0.5",
)
REPORTED = 8000  # tokens of each domain that other results are reported on


def measured(options, model):
    """Return {domain: perplexity} on held-out documents that nothing else is reported on."""
    tasks = [f"perplexity:{domain}" for domain in options.measured]
    evaluation = secateur.evaluate([model], tasks, limit=REPORTED + options.limit, data=options.data)
    tokenizer, found = load_tokenizer(resolve_model(options.model)), {}
    for domain in options.measured:
        reported = {w.document for w in held_out_windows(domain, tokenizer, max_tokens=REPORTED, data=options.data)}
        result = evaluation.cell(f"perplexity:{domain}", evaluation.models[0].name).result
        others = [document for document in result.documents if document.document not in reported]
        found[domain] = summarise(domain, others).perplexity
    return found


def recipe_of(options, row, seed):
    mixture, _, shape = row.partition(":")
    samples, _, length = (shape or "64x512").partition("x")
    domains = []
    for entry in mixture.split(","):
        domain, _, weight = entry.partition("=")
        path = options.output / f"{domain}.jsonl"
        domains.append(f"{path if domain in KINDS else domain}={weight or 1}")
    return make_recipe(
        {
            "model": options.model,
            "for": domains,
            "preset": options.preset,
            "sparsity": options.sparsity,
            "samples": int(samples),
            "sequence_length": int(length),
            "seed": seed,
        }
    )


def sub_model(options, row, seed):
    recipe = recipe_of(options, row, seed)
    name = f"{row.replace(':', '-').replace('=', '')}-{seed}"

    def make():
        folder = options.output / name
        derive_recipe(recipe, output=folder, data=options.data, resume=True)
        found = {"perplexity": measured(options, folder), "seconds": read_json(folder / LOG)["seconds"]}
        shutil.rmtree(folder)
        print(f"{name}: {found}", flush=True)
        return found

    settings = {"recipe": recipe.to_dict(), "limit": options.limit, "data": str(options.data)}
    return cached(options.output / f"{name}.json", settings, make)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, default=8000, help="tokens of held-out text of each domain")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.measured = list(dict.fromkeys([options.domain, "java", "general"]))
    for kind in KINDS:
        path = options.output / f"{kind}.jsonl"
        if any(kind in row for row in options.rows) and not path.exists():
            write_text(options.model, kind, path, domain=options.domain, data=options.data)
    settings = {"limit": options.limit, "model": options.model, "data": str(options.data)}
    path = options.output / "parent.json"
    parent = cached(path, settings, lambda: {"perplexity": measured(options, options.model)})["perplexity"]
    print("parent:", parent, flush=True)
    print("\n| calibration | " + " | ".join(options.measured) + " | seconds |")
    print("|---" * (len(options.measured) + 2) + "|")
    for row in options.rows:
        runs = [sub_model(options, row, seed) for seed in options.seeds]
        cells = [span([one["perplexity"][key] / parent[key] for one in runs], "{:.3f}") for key in options.measured]
        print(
            f"| {row} | " + " | ".join(cells) + f" | {span([one['seconds'] for one in runs], '{:.0f}')} |", flush=True
        )


if __name__ == "__main__":
    main()
