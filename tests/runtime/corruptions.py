"""Opens and runs models whose files were damaged at random, and counts what happens. Neither torch nor transformers.

A damaged model has to be refused with a `SecateurError`, or to run and compute something. Anything else is a failure:
another exception, a warning of numpy's, a crash or a sanitizer's report, more than 20 seconds, more than 2 GB. Each
case is a process of its own, forked from one that has imported everything; its number decides what is done to it.

    python -m tests.runtime.corruptions FOLDER [--count 1000] [--first 0] [--verbose]

FOLDER holds models, which take turns. `make corruptions` runs all of it under sanitizers, see sanitized.py.
"""

import argparse
import collections
import faulthandler
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random

import numpy as np

from secateur.errors import SecateurError
from secateur.runtime import kernels, native_model
from secateur.runtime.loading import load
from secateur.runtime.mapped import MappedFile, MappedTensor
from secateur.runtime.native_model import NativeSequence
from tests.runtime.damage import damage

SECONDS, NAP, BYTES = 20, 0.002, 2 * 2**30
RAN, REFUSED, FAILED = 0, 10, 11


class GuardedFile(MappedFile):
    """Tensors on the heap, each in a block of its own size: a sanitizer does not watch mapped files."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.tensors = {name: MappedTensor(one.dtype, one.array.copy()) for name, one in self.tensors.items()}


def use(folder: Path) -> None:
    """Open a model, generate from tokens and from text, and make a step of three texts together."""
    loaded = load(folder, engine="native", threads=2)
    loaded.generate("def f(x):", 3, ignore_eos=True)
    model = loaded.backend.model
    ids = [1 % model.architecture.vocabulary] * 20
    sequences = [NativeSequence(model, 24) for _ in range(3)]
    model.forward(ids, [sequences[0]] * 20, [False] * 20)
    for _ in range(2):
        logits = model.forward(ids[:3], sequences, [True, False, True])
    np.argmax(logits, axis=1)


def imported_all(folder: Path) -> None:
    """Use a model once, whole, so that forked processes find everything imported; none of its threads may live on."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    use(folder)
    gc.collect()


def outcome(folder: Path) -> int:
    warnings.simplefilter("error", RuntimeWarning)
    try:
        use(folder)
    except SecateurError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except BaseException:  # noqa: BLE001 - a panic of a tokenizer is no Exception
        traceback.print_exc()
        return FAILED
    return RAN


def wait_for(child: int) -> tuple[int, resource.struct_rusage]:
    """Return how a process ended and what it used; abort it, which shows where it is, when it takes too long."""
    # Time is counted in naps of one's own: a machine that is suspended, or busy with others, makes none of them.
    for _ in range(int(SECONDS / NAP)):
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        time.sleep(NAP)
    os.kill(child, signal.SIGABRT)
    return os.wait4(child, 0)[1:]


def run_case(folder: Path, work: Path, number: int) -> tuple[str, str]:
    """Damage a copy of `folder` and use it in a process of its own; return what happened, and in words why."""
    target, log = work / "model", work / "log"
    done = damage(shutil.copytree(folder, target), Random(f"{folder.parent.name} {folder.name} {number}"))  # noqa: S311
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            with log.open("wb") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            faulthandler.enable()
            code = outcome(target)
            sys.stderr.flush()
        finally:
            os._exit(code)
    status, usage = wait_for(child)
    code, said = os.waitstatus_to_exitcode(status), log.read_text(errors="replace").strip()
    shutil.rmtree(target)
    if usage.ru_maxrss * 1024 > BYTES:
        return "failed", f"{done}: {usage.ru_maxrss / 2**20:.1f} GB"
    if code in {RAN, REFUSED}:
        return ("ran", done) if code == RAN else ("refused", f"{done}: {said}")
    return "failed", f"{done}: exit code {code}\n{said[-6000:]}"


def run(root: Path, numbers: range, *, verbose: bool = False) -> dict[str, int]:
    """Run cases on the models in `root` in turn; print failures, return how many were refused, ran, and failed."""
    counts = collections.Counter(refused=0, ran=0, failed=0)
    folders = sorted(root.iterdir())
    imported_all(folders[0])
    with tempfile.TemporaryDirectory() as work:
        for number in numbers:
            folder = folders[number % len(folders)]
            result, why = run_case(folder, Path(work), number)
            counts[result] += 1
            if result == "failed" or verbose:
                print(f"{root.name}/{folder.name} case {number} {result}: {why}", file=sys.stderr, flush=True)
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="say of each case what was done, and what came of it")
    options = parser.parse_args()
    native_model.MappedFile = GuardedFile
    start = time.monotonic()
    counts = run(options.folder, range(options.first, options.first + options.count), verbose=options.verbose)
    seconds = round(time.monotonic() - start)
    print(json.dumps({"values": options.folder.name, "isa": kernels.isa(), **counts, "seconds": seconds}))
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
