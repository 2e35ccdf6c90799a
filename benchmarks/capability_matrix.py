"""What sub-models can still do: tasks down, models across, each beside the parent on the same problems.

    secateur derive PARENT --for python --preset best --samples 64 --sparsity 0.5 -o SUB-python       (and so on)
    python benchmarks/capability_matrix.py -o OUT --kept docs/results/matrix-qwen \\
        parent=PARENT python=SUB-python java=SUB-java ... [--tasks humaneval gsm8k:60 ...] [--data FOLDER]

Each model is measured by `secateur evaluate` on each task, with as many problems as stand behind its last colon;
programs run in the sandbox. OUT keeps answers, and an interrupted measurement goes on there. `--kept` gets a small file
for each model, NAME.json, with what came of every problem: so a model can be added to a table months later, and every
interval can be computed again. A model whose file is there is not measured again, and needs no folder behind its name.
Prints the matrix, and the difference of each model from the parent, or from another with `--against NAME`, with
p-values corrected for all of them (Holm), and says where models were not measured alike.
"""

import argparse
import json
import time
from pathlib import Path

import secateur
from secateur.checkpoint.format import LOG, MANIFEST, dump_json, read_json
from secateur.evaluation.measuring import compare_all
from secateur.evaluation.perplexity import DocumentLoss, summarise
from secateur.evaluation.programs.generation import Asking
from secateur.evaluation.programs.run import slug
from secateur.evaluation.proportions import Share
from secateur.evaluation.results import Cell, ModelRecord
from secateur.evaluation.scores import Scores
from secateur.evaluation.tables import format_cell, format_difference
from secateur.files import atomic_write_bytes, sha256_file
from secateur.models.source import resolve_model

PARENT = "parent"
TASKS = (
    "humaneval:164",
    "mbpp:80",
    "multipl-e:java:80",
    "multipl-e:cpp:80",
    "multipl-e:javascript:80",
    "gsm8k:60",
    "arc-easy:200",
    "translation:de-en:60",
    "perplexity:python",
    "perplexity:java",
    "perplexity:general",
)


def split(task):
    """Return name and number of problems, which is None for text."""
    name, _, count = task.rpartition(":")
    return (name, int(count)) if count.isdigit() else (task, None)


def measured(options, name, path):
    """Return {task: what `evaluate` found, as JSON} and what the model is, from the file that is kept."""
    target = options.kept / f"{name}.json"
    found = read_json(target) if target.exists() else {"name": name, "tasks": {}}
    hashes = hashes_of(path) if path else found.get("sha256")
    if found.setdefault("sha256", hashes) != hashes:
        raise SystemExit(f"{target} is of another model than {path}")
    for task in options.tasks:
        kind, problems = split(task)
        if task in found["tasks"]:
            continue
        if not path:
            raise SystemExit(f"{target} has no {task}: name a model, {name}=FOLDER")
        folder, begin = options.output / name / slug(task), time.monotonic()
        if not (folder / "results.json").exists():
            secateur.evaluate(
                path,
                kind,
                problems=problems,
                output=folder,
                data=options.data,
                asking=Asking(batch=options.batch),
                run_generated_code=True,
                threads=options.threads,
            )
        result = read_json(folder / "results.json")
        model, cell = result["models"][0], result["cells"][0]
        if model["sha256"] != hashes:
            raise SystemExit(f"{folder} is of another model than {path}: name another output")
        found |= {"vocabulary": model["vocabulary"], "dtype": model["dtype"], **described(Path(path))}
        found["tasks"][task] = {
            "text_sha256": cell["text_sha256"],
            "result": cell["result"],
            "benchmark": result["benchmarks"].get(kind),
            "engine": model["engine"],
            "settings": result["settings"],
            "versions": result["versions"],
            "seconds": round(time.monotonic() - begin, 1),
        }
        atomic_write_bytes(target, dump_json(found))
        print(f"{name} {task}: {time.monotonic() - begin:.0f} s", flush=True)
    return found


def hashes_of(path):
    folder = resolve_model(path)
    return {file.name: sha256_file(file) for file in (folder.path / "config.json", *folder.weight_files())}


def described(path):
    """Return what a sub-model was made with, nothing of a base."""
    if not (path / MANIFEST).exists():
        return {}
    manifest = read_json(path / MANIFEST)
    seconds = read_json(path / LOG).get("seconds") if (path / LOG).exists() else None
    return {"recipe": manifest["recipe"], "sparsity": manifest["sparsity"], "derived_in_seconds": seconds}


def cell_of(task, model, kept):
    """Return a cell as `evaluate` gives it."""
    result = kept["result"]
    if "documents" in result:
        documents = [DocumentLoss(**one) for one in result["documents"]]
        return Cell(task, model, kept["text_sha256"], summarise(result["domain"], documents))
    means = {metric: Share(**share) for metric, share in result["means"].items()}
    return Cell(task, model, kept["text_sha256"], Scores(**{**result, "means": means}))


def compared(options, models):
    """Return the cells [models][tasks], each with its comparison to the parent."""
    records = [ModelRecord(one["name"], one["name"] != PARENT, {}, "", one["vocabulary"]) for one in models]
    columns = [[cell_of(task, one["name"], one["tasks"][task]) for task in options.tasks] for one in models]
    for row in zip(*columns, strict=True):
        if len({cell.text_sha256 for cell in row}) > 1:
            raise SystemExit(f"{row[0].task}: models were asked different problems")
    return compare_all(records, columns, options.against)


def tell_differences(options, models):
    """Print what differs in how models were measured, beside the threads."""
    for task in options.tasks:
        kept = [one["tasks"][task] for one in models]
        ways = [
            {
                **{key: value for key, value in one["settings"].items() if key != "threads"},
                "benchmark": one["benchmark"],
                "engine": one["engine"],
                "style": one["result"].get("style"),
                "versions": one["versions"],
            }
            for one in kept
        ]
        for key in dict.fromkeys(key for way in ways for key in way):
            values = [json.dumps(way.get(key), sort_keys=True) for way in ways]
            if len(set(values)) > 1:
                told = "; ".join(f"{one['name']}: {value}" for one, value in zip(models, values, strict=True))
                print(f"{task}, {key} differs: {told}")


def table(options, models, title, form, columns):
    print(f"\n| {title} | " + " | ".join(one["name"] for one in models) + " |")
    print("|---" * (len(models) + 1) + "|")
    for number, task in enumerate(options.tasks):
        print(f"| {task} | " + " | ".join(form(column[number]) for column in columns) + " |")


def value(cell):
    if isinstance(cell.result, Scores):
        share = cell.result.main
        return f"{100 * share.value:.1f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"
    return f"{cell.result.bits_per_byte:.3f} bits/byte"


def difference(cell):
    if cell.comparison is None:
        return ""
    if isinstance(cell.result, Scores):
        return format_difference(cell.comparison)
    return format_cell(cell).partition("  ")[2]


def kept_share(cell):
    kept = cell.comparison.paired.kept if isinstance(cell.result, Scores) and cell.comparison else None
    return "" if kept is None else f"{kept.value:.2f} [{kept.low:.2f}, {kept.high:.2f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME[=FOLDER]", help="the parent's name is 'parent'")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--kept", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--against", default=PARENT, help="the model that the others are compared with")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    options.kept.mkdir(parents=True, exist_ok=True)
    named = dict(one.partition("=")[::2] for one in options.models)
    models = [measured(options, name, path) for name, path in named.items()]
    if options.against not in named:
        return
    columns = compared(options, models)
    tell_differences(options, models)
    table(options, models, "task", value, columns)
    if len(models) == 1:
        return
    others = (
        [one for one in models if one["name"] != options.against],
        [c for c, one in zip(columns, models, strict=True) if one["name"] != options.against],
    )
    table(options, others[0], f"difference from {options.against}, points or perplexity", difference, others[1])
    table(options, others[0], f"share of what {options.against} has", kept_share, others[1])


if __name__ == "__main__":
    main()
