"""How much sooner the first token of a long prompt comes when most of it was read before.

    python benchmarks/prefix_reuse.py SUB [--context 2000] [--appended 20] [--rounds 3] [--threads N]

The prompt is source code of Python's standard library, given as text, as an editor would give it: both ways it is split
into tokens anew. In each round it is read once after an unrelated text, and once after its own beginning (all but the
appended tokens). Native engine. Prints medians over rounds, and each round.
"""

import argparse
import inspect
import shutil
import statistics
import time

from secateur.resources import usable_processors
from secateur.runtime.loading import load


def prompts(codec, context, appended):
    """Return the beginning of a source text, and the same with some tokens more."""
    ids = codec.encode(inspect.getsource(shutil))[: context + appended]
    if len(ids) < context + appended:
        raise SystemExit(f"the text has {len(ids)} tokens only")
    return codec.decode(ids[:context]), codec.decode(ids)


def seconds(model, prompt):
    """Return how long the first token takes."""
    started = time.perf_counter()
    model.generate(prompt, 1, ignore_eos=True)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--appended", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_processors())
    options = parser.parse_args()
    model = load(options.model, engine="native", threads=options.threads)
    codec = model.backend.codec
    before, prompt = prompts(codec, options.context, options.appended)
    anew, again, split = [], [], []
    for _ in range(options.rounds):
        model.generate("unrelated", 1)
        anew.append(seconds(model, prompt))
        model.generate(before, 1)  # from now on the model knows this much
        again.append(seconds(model, prompt))
        started = time.perf_counter()
        codec.encode(prompt)
        split.append(time.perf_counter() - started)
    print(f"{options.context} tokens and {options.appended} more, {options.threads} threads, {options.rounds} rounds")
    for name, found in (("read anew", anew), ("after its beginning", again), ("of that, split into tokens", split)):
        rounds = ", ".join(f"{1e3 * value:.1f}" for value in found)
        print(f"{name:>27}: {1e3 * statistics.median(found):8.1f} ms   ({rounds})")
    print(f"{'times as soon':>27}: {statistics.median(anew) / statistics.median(again):8.1f}")


if __name__ == "__main__":
    main()
