"""Which runs of 13 words and signs a calibration set has in common with benchmarks of programs.

    python benchmarks/text_overlap.py MODEL --for DOMAIN ... [--samples 128] [--tasks humaneval mbpp]
        [--recover TOKENS] [--recover-for DOMAIN ...] [--outcomes PARENT.json SUB.json]

`secateur derive` records how many problems have such runs; this also prints the runs, with how many problems have
each, to be judged by a reader. Draws the text as `derive` does with the same options (and what `--recover` would learn
from). A problem's text is its prompt and, where it has one, the benchmark's own solution.
With `--outcomes`, files that `capability_matrix.py` keeps, it tells what the sub-model kept of the problems that have
such a run or a function of the same name as one in the text, and of all others.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import secateur
from secateur.calibration.benchmark_runs import count_overlaps, runs
from secateur.checkpoint.format import read_json
from secateur.evaluation.programs.loading import load_benchmark
from secateur.evaluation.proportions import paired
from secateur.models.source import load_tokenizer, resolve_model

DEFINED = re.compile(r"\bdef (\w+)\(")


def solved(file, task):
    """Return the hash of what was asked and {problem: solved}, of the measurement that asked most of a task."""
    kept = [one for name, one in read_json(file)["tasks"].items() if name.startswith(f"{task}:")]
    if not kept:
        raise SystemExit(f"{file} has no {task}")
    most = max(kept, key=lambda one: len(one["result"]["values"]))
    return most["text_sha256"], most["result"]["values"]


def outcomes_of(files, tasks):
    """Return for each task {problem: solved} of the parent and of the sub-model."""
    outcomes = {}
    for task in tasks:
        (parent_hash, parent), (hashed, submodel) = (solved(file, task) for file in files)
        if parent_hash != hashed or parent.keys() != submodel.keys():
            raise SystemExit(f"{task}: the models of {files[0]} and {files[1]} were asked different problems")
        outcomes[task] = parent, submodel
    return outcomes


def tell_kept(outcomes, alike):
    """Print what a sub-model kept of the problems that are like its text, and of the others."""
    for title, chosen in (("like the text", alike), ("all others", outcomes[0].keys() - alike)):
        parent, submodel = ([values[name] for name in outcomes[0] if name in chosen] for values in outcomes)
        if not parent:
            continue
        kept = paired(submodel, parent).kept
        share = "" if kept is None else f", {kept.value:.2f} ({kept.low:.2f} to {kept.high:.2f})"
        print(f"  {title}: {len(parent)} problems, parent {sum(parent):g}, sub-model {sum(submodel):g}{share}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--for", dest="domains", action="append", required=True)
    parser.add_argument("--recover-for", dest="learnt", action="append", help="those of --for where not given")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--recover", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=["humaneval", "mbpp"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--outcomes", nargs=2, type=Path, metavar=("PARENT.json", "SUB.json"))
    options = parser.parse_args()
    outcomes = outcomes_of(options.outcomes, options.tasks) if options.outcomes else {}
    tokenizer, texts = load_tokenizer(resolve_model(options.model)), []
    for domains, samples in (
        (options.domains, options.samples),
        (options.learnt or options.domains, options.recover // 512),
    ):
        if samples:
            drawn = secateur.calibrate(domains, tokenizer, samples=samples, data=options.data, seed=options.seed)
            texts += [tokenizer.decode(row) for row in drawn.token_ids.tolist()]
    seen, counted = {run for text in texts for run in runs(text)}, count_overlaps(texts)
    named = {name for text in texts for name in DEFINED.findall(text)}
    for task in options.tasks:
        print(f"{task}: {counted.get(task, 'its runs are not stored')}")
        problems = load_benchmark(task, options.data).problems
        parts = {name: (one.prompt, one.solution or "") for name, one in problems.items()}
        shared = {name: seen & {run for part in pair for run in runs(part)} for name, pair in parts.items()}
        for run, number in Counter(run for some in shared.values() for run in some).most_common():
            print(f"  {number} problems: {run}")
        same_name = {name for name, pair in parts.items() if named & set(DEFINED.findall("\n".join(pair)))}
        print(f"  {len(same_name)} problems have a function, helpers too, with the name of one in the text")
        if task in outcomes:
            tell_kept(outcomes[task], same_name | {name for name, some in shared.items() if some})


if __name__ == "__main__":
    main()
