"""Which runs of 13 words and signs a calibration set has in common with benchmarks of programs.

    python benchmarks/text_overlap.py MODEL --for DOMAIN ... [--samples 128] [--tasks humaneval mbpp]
        [--recover TOKENS] [--recover-for DOMAIN ...]

`secateur derive` records how many problems have such runs; this also prints the runs, with how many problems have
each, to be judged by a reader. Draws the text as `derive` does with the same options (and what `--recover` would learn
from). A problem's text is its prompt and, where it has one, the benchmark's own solution.
"""

import argparse
from collections import Counter
from pathlib import Path

import secateur
from secateur.calibration.benchmark_runs import count_overlaps, runs
from secateur.evaluation.programs.loading import load_benchmark
from secateur.models.source import load_tokenizer, resolve_model


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
    options = parser.parse_args()
    tokenizer, texts = load_tokenizer(resolve_model(options.model)), []
    for domains, samples in (
        (options.domains, options.samples),
        (options.learnt or options.domains, options.recover // 512),
    ):
        if samples:
            drawn = secateur.calibrate(domains, tokenizer, samples=samples, data=options.data, seed=options.seed)
            texts += [tokenizer.decode(row) for row in drawn.token_ids.tolist()]
    seen, counted = {run for text in texts for run in runs(text)}, count_overlaps(texts)
    for task in options.tasks:
        print(f"{task}: {counted.get(task, 'its runs are not stored')}")
        problems = load_benchmark(task, options.data).problems.values()
        found = Counter(run for one in problems for run in seen & set(runs(one.prompt + (one.solution or ""))))
        for run, number in found.most_common():
            print(f"  {number} problems: {run}")


if __name__ == "__main__":
    main()
