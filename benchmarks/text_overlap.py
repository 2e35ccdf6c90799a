"""How much of a benchmark stands in a calibration set: runs of 13 tokens that both have.

    python benchmarks/text_overlap.py MODEL --for DOMAIN ... [--samples 128] [--recover TOKENS] [--tasks humaneval mbpp]

Draws the calibration set as `secateur derive` does with the same options (and what `--recover` would learn from), and
looks for runs of 13 tokens of the model's tokenizer in each problem's text: prompt, the benchmark's own solution where
it has one, and checks. Prints how many problems have such a run, and the runs: what is usual in any program has some.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import secateur
from secateur.evaluation.programs.loading import load_benchmark
from secateur.models.source import load_tokenizer, resolve_model

RUN = 13


def runs(token_ids):
    return zip(*(token_ids[shift:] for shift in range(RUN)), strict=False)


def shared(tokenizer, seen, problem):
    """Return the runs of a problem's text that are in `seen`, as text."""
    text = f"{problem.prompt}{problem.solution or ''}\n{problem.checks}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(run) for run in runs(ids) if run in seen]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--for", dest="domains", action="append", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--recover", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=["humaneval", "mbpp"])
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    tokenizer, seen = load_tokenizer(resolve_model(options.model)), set()
    domains = {name: float(weight or 1) for name, _, weight in (one.partition("=") for one in options.domains)}
    for samples in (options.samples, options.recover // 512):
        if samples:
            drawn = secateur.calibrate(domains, tokenizer, samples=samples, data=options.data, seed=options.seed)
            seen |= {run for row in drawn.token_ids.tolist() for run in runs(row)}
    for task in options.tasks:
        problems, found = load_benchmark(task, options.data).problems, defaultdict(set)
        for name, problem in problems.items():
            for run in shared(tokenizer, seen, problem):
                found[run].add(name)
        touched = set().union(*found.values())
        print(f"{task}: {len(touched)} of {len(problems)} problems have a run of {RUN} tokens of {len(seen)}")
        for run, names in sorted(found.items(), key=lambda one: -len(one[1])):
            print(f"  {len(names)} problems: {run!r}")


if __name__ == "__main__":
    main()
