"""The page on which a person decides: bytes, decoding speed and quality of sub-models beside llama.cpp's own files.

    python benchmarks/frontier.py PARENT.gguf -o OUT [--for python] [--sizes 200MB 250MB 300MB] [--subs FOLDER ...] \\
        [--types Q8_0 Q4_K_M Q2_K Q2_K/Q4_0 ...] [--smaller MODEL.gguf ...] [--samples 64] [--preset best] \\
        [--vocabulary 48000 [--smaller-types Q4_0/Q4_0 ...]] [--no-speed]

For one parent and one domain: sub-models derived for each size (`secateur derive --target-size`, with as many tokens as
`--vocabulary` says) and those named with `--subs`; the parent as it is, lossless by definition; the parent quantised by
llama.cpp to each type, with an importance matrix from the same calibration text (the mean squares of the inputs of each
weight, which is what llama-imatrix computes), with all its tokens and, for `--smaller-types`, with the tokens that
sub-models have, which llama.cpp has no tool for; and smaller dense models. A type may name that of embedding and head
behind a slash: without it llama.cpp gives them more bits, often Q8_0. A matrix that a file has twice, as embedding and
as head, is stored once in llama.cpp's files too. Quality is bits per byte of the same held-out
text, drawn in the parent's tokens, of the values as they are stored: llama.cpp's are unpacked and run by transformers,
so that no rounding of activations is held against either side. Speed is one run of `secateur benchmark` in which all of
them alternate. Writes OUT/NAME.json for each model, OUT/frontier.json and, where matplotlib is installed,
OUT/frontier.svg, and prints the table. What is finished in OUT is used again; OUT/cache has converted files.
"""

import argparse
import os
from pathlib import Path

from caching import cached
from llama_files import importance_matrix, quantise, smaller_file, tied_file

from secateur.calibration.held_out import held_out_windows, in_other_tokens
from secateur.calibration.mixture import parse_mixture
from secateur.checkpoint.format import MANIFEST, dump_json, read_json
from secateur.config import make_recipe
from secateur.evaluation.perplexity import evaluate_perplexity
from secateur.evaluation.speed import benchmark
from secateur.files import atomic_write_bytes
from secateur.models.source import load_tokenizer, resolve_model
from secateur.pruning.derive import derive_recipe
from secateur.pruning.vocabulary import with_vocabulary
from secateur.runtime.loading import open_model

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ3_XS", "Q2_K", "Q4_0/Q4_0", "Q3_K_M/Q4_0", "Q2_K/Q4_0")
GENERAL = "general"


def llama_files(options):
    """Return {name: file} of both kinds, with all tokens and with as many as sub-models have."""
    parent, folder = options.parent, options.folder
    tied = tied_file(parent, folder, options.output / f"{parent.stem}-tied.gguf")
    found = quantised(options, folder, tied, options.types, "")
    if options.smaller_types:
        smaller = with_vocabulary(folder, parse_mixture((options.domain,)), options.vocabulary, data=options.data)
        source = smaller_file(tied, folder, smaller, options.output / f"{parent.stem}-{options.vocabulary}.gguf")
        found |= quantised(options, smaller, source, options.smaller_types, f"-{options.vocabulary}")
    return found


def quantised(options, folder, source, types, suffix):
    """Return {type: file} of one source, made where they are not there yet."""
    found, matrix = {}, None
    for kind in types:
        target = options.output / f"{options.domain}-{kind}{suffix}.gguf".replace("/", "_")
        found[f"{kind}{suffix}"] = target
        if not target.exists():
            matrix = matrix or importance_matrix(folder, options.domain, options.samples, options.data)
            quantise(source, kind, matrix, target)
    return found


def sub_models(options):
    """Return {name: folder} of those that are given and those derived for a size."""
    found = {folder.name: folder for folder in options.subs}
    for size in options.sizes:
        recipe = make_recipe(
            {
                "model": str(options.parent),
                "for": options.domain,
                "preset": options.preset,
                "target_size": size,
                "samples": options.samples,
                "vocabulary": options.vocabulary,
            }
        )
        tokens = "" if options.vocabulary is None else f"-{options.vocabulary}"
        folder = options.output / f"sub-{size.replace(' ', '')}{tokens}"
        derive_recipe(recipe, output=folder, data=options.data, resume=True, announce=print)
        found[folder.name] = folder
    return found


def bytes_of(path):
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file()) if path.is_dir() else path.stat().st_size


def quality(options, name, path):
    """Return {domain: [bits per byte of held-out text, its tokens]}."""
    domains = dict.fromkeys([options.domain, GENERAL])
    settings = {"path": str(path), "bytes": bytes_of(path), "limit": options.limit, "domains": list(domains)}

    def make():
        folder = resolve_model(str(path))
        reference, tokenizer, model = load_tokenizer(options.folder), load_tokenizer(folder), open_model(folder)
        found = {}
        for one in domains:
            windows = held_out_windows(one, reference, max_tokens=options.limit, data=options.data)
            result = evaluate_perplexity(model, in_other_tokens(windows, tokenizer), one)
            found[one] = [result.bits_per_byte, result.n_tokens]
        print(name, found, flush=True)
        return found

    return cached(options.output / f"quality-{name.replace('/', '_')}.json", settings, make)


def described(path):
    """Return what a sub-model is: sparsity and values."""
    if not path.is_dir():
        return ""
    manifest = read_json(path / MANIFEST)
    recipe = manifest["recipe"]
    embedding = "" if recipe["values"] == "base" else f", embedding {recipe['embedding_values']}"
    tokens = f", {recipe['vocabulary']:,} tokens" if recipe.get("vocabulary") else ""
    groups = f" in groups of {recipe['group_size']}" if recipe["group_size"] else ""
    share = manifest.get("eight_bits")
    wide = f", {share:.1%} in eight bits" if share else ""
    return f"{manifest['values']}{groups}{wide}, {manifest['sparsity']:.1%} removed{embedding}{tokens}"


def speeds(options, models):
    """Return {name: median tokens/s} of one run in which all models alternate."""
    folders = [path for path in models.values() if path.is_dir()]
    files = [path for path in models.values() if not path.is_dir()]
    against = [f"native:{path}" for path in folders[1:]] + [f"llama.cpp:{path}" for path in files]
    settings = {"models": [f"{path} {bytes_of(path)}" for path in (*folders, *files)], "rounds": options.rounds}

    def make():
        report = benchmark(folders[0], against, rounds=options.rounds, prompt_lengths=(512,), new_tokens=128, batch=1)
        pairs = zip((*folders, *files), report.models, strict=True)
        found = {str(path): {key: speed.median(key) for key in speed.tokens_per_second} for path, speed in pairs}
        return {"speeds": found, "machine": report.machine, "threads": report.threads, "busy": report.busy}

    return cached(options.output / "speed.json", settings, make)


def draw(rows, domain, target):
    """Draw bits per byte over bytes, and tokens/s over bytes; nothing without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no figure: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, key, label in zip(axes, ("bits", "decode"), (f"bits per byte, {domain}", "tokens/s"), strict=True):
        for kind, marker in (("secateur", "o"), ("llama.cpp", "s"), ("smaller", "^")):
            points = sorted(
                (row["bytes"] / 1e6, row[key], "the parent, lossless" if row["name"] == "parent" else row["name"])
                for row in rows
                if row["kind"] == kind
            )
            if points:
                axis.plot(*zip(*[point[:2] for point in points], strict=True), marker=marker, label=kind)
            for x, y, name in points:
                axis.annotate(name, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.set(xlabel="MB", ylabel=label)
        axis.legend()
    figure.tight_layout()
    figure.savefig(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--for", dest="domain", default="python")
    parser.add_argument("--sizes", nargs="*", default=[])
    parser.add_argument("--subs", nargs="*", type=Path, default=[])
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--smaller-types", nargs="*", default=[], help="types with as many tokens as --vocabulary")
    parser.add_argument("--smaller", nargs="*", type=Path, default=[], help="GGUF files of smaller dense models")
    parser.add_argument("--preset", default="best")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--limit", type=int, default=8000, help="tokens of held-out text of each domain")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, help="tokens of sub-models that are derived")
    parser.add_argument("--no-speed", action="store_true", help="stop before models are timed: the machine is busy")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    if options.smaller_types and options.vocabulary is None:
        parser.error("--smaller-types have as many tokens as --vocabulary says: give it")
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["SECATEUR_CACHE"] = str(options.output.resolve() / "cache")  # a converted file is larger than itself
    options.folder = resolve_model(str(options.parent))
    kinds = {
        "secateur": sub_models(options),
        "llama.cpp": {"parent": options.parent, **llama_files(options)},
        "smaller": {path.stem: path for path in options.smaller},
    }
    models = {name: path for group in kinds.values() for name, path in group.items()}
    measured = {name: quality(options, name, path) for name, path in models.items()}
    if options.no_speed:
        return
    timed = speeds(options, models)
    rows = [
        {
            "name": name,
            "kind": kind,
            "what": described(path),
            "bytes": bytes_of(path),
            "bits": measured[name][options.domain][0],
            "english": measured[name][GENERAL][0],
            "decode": timed["speeds"][str(path)]["decode"],
            "prefill": timed["speeds"][str(path)]["prefill 512"],
        }
        for kind, group in kinds.items()
        for name, path in group.items()
    ]
    rows.sort(key=lambda row: row["bytes"])
    atomic_write_bytes(options.output / "frontier.json", dump_json({"rows": rows, "machine": timed["machine"]}))
    print(f"\n{timed['machine']}, {timed['threads']} threads\n")
    lossless = measured["parent"][options.domain][0]
    print(f"| | | MB | bits per byte, {options.domain} | beside the parent | English | tokens/s | prompt 512 |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        figures = [f"{row['bits']:.4f}", f"{row['bits'] / lossless - 1:+.1%}", f"{row['english']:.4f}"]
        figures += [f"{row['decode']:.1f}", f"{row['prefill']:.0f}"]
        what = row["what"] or ("lossless" if row["name"] == "parent" else row["kind"])
        print("| " + " | ".join([row["name"], what, f"{row['bytes'] / 1e6:.0f}", *figures]) + " |")
    draw(rows, options.domain, options.output / "frontier.svg")


if __name__ == "__main__":
    main()
