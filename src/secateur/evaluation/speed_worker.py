"""One model in a process of its own, told over pipes what to time: a JSON object a line in, one a line out.

Run by `Worker`, as `python -m secateur.evaluation.speed_worker KIND PATH THREADS`. Token ids are random: speed does not
depend on what the text says.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import psutil

from secateur.errors import SecateurError

MB = 1e6


# How OpenMP's threads wait: llama.cpp's take twice the time for a token where a shell happens to say `passive`.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a process that is timed: each program waits in its own way."""
    inherited = {name: value for name, value in os.environ.items() if name not in _WAITING}
    return {**inherited, "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": str(threads)}


class Worker:
    """The parent's end: starts the process and asks it, one question at a time.

    Raises
    ------
    SecateurError
        When the process cannot load its model, or ends unexpectedly.
    """

    def __init__(self, kind: str, path: str, threads: int) -> None:
        self.name = f"{kind} {path}"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close(); a pipe would fill up
        self._process = subprocess.Popen(
            [sys.executable, "-m", "secateur.evaluation.speed_worker", kind, path, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(threads),
        )
        try:
            self.loaded = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, question: str, **options: Any) -> dict[str, Any]:
        """Return the answer to one of `prefill`, `decode`, `limits` and `memory`."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it has ended: the answer says how
                self._process.stdin.write(json.dumps({"question": question, **options}) + "\n")
                self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _answer(self) -> dict[str, Any]:
        while self._process.stdout is not None and (line := self._process.stdout.readline()):
            if not line.startswith("{"):  # what a library prints
                continue
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise SecateurError(f"{self.name}: {answer['error']}")
            return answer
        code = self._process.wait()
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise SecateurError(
            f"{self.name} ended while it was timed, with {how}: {errors.strip()[-200:] or 'no message'}"
        )


def _prompt(vocabulary: int, length: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, vocabulary, length).tolist()
    return found


def _memory() -> dict[str, float]:
    """Return resident MB, and those of them that are not pages of mapped files."""
    info = psutil.Process().memory_info()
    return {"resident_mb": info.rss / MB, "private_mb": (info.rss - getattr(info, "shared", 0)) / MB}


def main(kind: str, path: str, threads: int) -> None:
    """Load, then answer until the pipe closes."""
    started = psutil.Process().create_time()
    try:
        from secateur.evaluation.speed_runners import open_runner

        runner = open_runner(kind, path, threads)
    except SecateurError as error:
        _say({"error": str(error)})
        return
    except Exception as error:  # noqa: BLE001 - another program's library raises what it likes
        _say({"error": f"it cannot be loaded ({' '.join(str(error).split()) or type(error).__name__})"})
        return
    _say(
        {"kind": runner.kind, "max_positions": runner.max_positions, "load_seconds": time.time() - started, **_memory()}
    )
    for line in sys.stdin:
        asked: Mapping[str, Any] = json.loads(line)
        if asked["question"] == "memory":
            _say(_memory())
        elif asked["question"] == "limits":
            _say(runner.limits(asked["bytes_per_second"]))
        elif asked["question"] == "prefill":
            _say({"seconds": runner.prefill(_prompt(runner.vocabulary, asked["length"], asked["seed"]))})
        else:
            prompts = [
                _prompt(runner.vocabulary, asked["length"], asked["seed"] + index) for index in range(asked["batch"])
            ]
            _say({"seconds": runner.decode(prompts, asked["count"])})


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
