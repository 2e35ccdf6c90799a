"""How much faster a benchmark of programs is answered in batches than one at a time, and how long its programs run.

    python benchmarks/answer_speed.py MODEL ... [--task humaneval] [--problems 64] [--batch 32] [--threads N]

Groups of `--batch` problems are answered in the model's chat template, the most likely token each time, at most 512 new
ones: each group together and then one by one, in turns, so that both see the same machine. Then the answers' programs
are run, in as many workers as there are processors. Prints seconds, tokens that were written and read for a second, and
the ratio; on a machine that does nothing else.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import secateur
from secateur.evaluation.journal import Journal
from secateur.evaluation.programs.generation import Asking, generate
from secateur.evaluation.programs.loading import load_benchmark
from secateur.evaluation.programs.run import chosen
from secateur.evaluation.programs.score import score


def answered(model, problems, batch, path):
    """Return seconds and answers."""
    begin = time.monotonic()
    with Journal(path) as journal:
        generate(model, problems, Asking(batch=batch), journal, lambda *_: None)
        return time.monotonic() - begin, list(journal.records)


def measure(options, name, folder):
    model = secateur.load(name, threads=options.threads)
    problems = list(chosen(load_benchmark(options.task, options.data).problems, options.problems).values())
    seconds, answers = {"together": 0.0, "alone": 0.0}, {"together": [], "alone": []}
    for begin in range(0, len(problems), options.batch):
        group = problems[begin : begin + options.batch]
        for way, batch in (("together", options.batch), ("alone", 1)):
            took, found = answered(model, group, batch, folder / f"{way}-{begin}.jsonl")
            seconds[way] += took
            answers[way] += found
    rates = {}
    for way, found in answers.items():
        tokens = sum(len(model.backend.codec.encode_plain(one["completion"])) for one in found)
        rates[way] = tokens / seconds[way]
        print(f"{name}, {way}: {seconds[way]:.0f} s, {tokens} tokens, {rates[way]:.1f} tokens/s", flush=True)
    same = sum(
        one["completion"] == other["completion"]
        for one, other in zip(answers["together"], answers["alone"], strict=True)
    )
    print(
        f"{name}: x{rates['together'] / rates['alone']:.2f} in batches; {same} of {len(problems)} answers are the same"
    )
    with Journal(folder / "samples.jsonl") as journal:
        journal.append(answers["together"])
    begin = time.monotonic()
    found = score(folder / "samples.jsonl", options.task, folder / "scored", run_generated_code=True, data=options.data)
    print(
        f"{name}: {len(problems)} programs run in {time.monotonic() - begin:.1f} s; {found['pass@1']['value']:.1%} pass"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--task", default="humaneval")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, {options.threads or 'all'} threads")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            measure(options, name, Path(folder))


if __name__ == "__main__":
    main()
