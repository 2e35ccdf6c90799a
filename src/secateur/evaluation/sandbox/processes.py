"""Starts a command, reads what it writes, and ends it with all that it started when a limit is passed."""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import psutil

from secateur.evaluation.sandbox.limits import Limits

Ended = Literal["exited", "killed", "time", "memory", "output", "failed"]
_STEP = 0.05  # seconds between looks at the memory
_PIECE = 1 << 16


@dataclass(frozen=True)
class Finished:
    """How a run ended.

    Attributes
    ----------
    ended
        `exited` by itself; `killed` by a signal that it caused; ended because it passed a limit of `time`, `memory` or
        `output`; or `failed` to start.
    code
        Exit code, or number of the signal where it was killed; 0 where a limit was passed.
    output, errors
        The ends of what it wrote on its standard outputs.
    seconds
        On the clock.
    """

    ended: Ended
    code: int
    output: str
    errors: str
    seconds: float


class _Tail:
    """The end of what was written, and how much that was."""

    def __init__(self, kept: int) -> None:
        self.kept, self.size, self.end = kept, 0, b""

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self.end = (self.end + piece)[-self.kept :]

    def text(self) -> str:
        return self.end.decode("utf-8", "replace")


def watched(
    command: Sequence[str],
    limits: Limits,
    *,
    given: bytes = b"",
    inherited: Sequence[int] = (),
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run a command within limits of time, memory together and output; the others are the command's own business.

    The command gets a session of its own, and `given` (at most 4,096 bytes, which a pipe holds) as its input. When this
    returns it and its children are gone.
    """
    begin = time.monotonic()
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=tuple(inherited),
        start_new_session=True,
        cwd=folder,
        env=None if environment is None else dict(environment),
    )
    output, errors = _Tail(limits.kept), _Tail(limits.kept)
    try:
        _give(process, given)
        passed = _read(process, {"out": output, "err": errors}, limits, begin + limits.wall_seconds)
    finally:
        _end(process)
    seconds = time.monotonic() - begin
    ended, code = _ending(process.returncode)
    if passed is not None:
        ended, code = passed, 0
    return Finished(ended, code, output.text(), errors.text(), seconds)


def _give(process: subprocess.Popen[bytes], given: bytes) -> None:
    assert process.stdin is not None  # noqa: S101 - a pipe was asked for
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(given)


def _read(
    process: subprocess.Popen[bytes], tails: Mapping[str, _Tail], limits: Limits, deadline: float
) -> Literal["time", "memory", "output"] | None:
    """Read until the process ends; return the limit that it passed, if it did."""
    with selectors.DefaultSelector() as selector:
        assert process.stdout is not None  # noqa: S101 - pipes were asked for
        assert process.stderr is not None  # noqa: S101
        for name, pipe in (("out", process.stdout), ("err", process.stderr)):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, tails[name])
        looked = 0.0
        while True:
            for key, _ in selector.select(_STEP):
                if not _read_piece(key.fileobj, key.data):  # type: ignore[arg-type]
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            if sum(tail.size for tail in tails.values()) > limits.output:
                return "output"
            if process.poll() is None and now > deadline:
                return "time"
            if now > looked + _STEP:
                looked = now
                if _memory(process.pid) > limits.memory:
                    return "memory"
            if process.poll() is not None and _drained(selector):
                return None
            if not selector.get_map():
                time.sleep(0.001 if now < looked + 0.01 else 0.01)


def _drained(selector: selectors.BaseSelector) -> bool:
    """Return whether nothing is left to read now; who else holds the pipes of an ended process is not waited for."""
    return not selector.select(0)


def _read_piece(pipe: IO[bytes], tail: _Tail) -> bool:
    """Read what is there; return whether more may come."""
    try:
        piece = os.read(pipe.fileno(), _PIECE)
    except BlockingIOError:
        return True
    tail.add(piece)
    return bool(piece)


def _memory(pid: int) -> int:
    """Return the bytes that a process and its descendants have, swapped or not; what they share counts for each."""
    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_info().rss + _swapped(process.pid)
    return total


def _swapped(pid: int) -> int:
    """Return the bytes of a process that the system has moved out of memory; 0 where it does not tell."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmSwap:"):
                return int(line.split()[1]) * 1024
    return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: its whole session, and what has left the session."""
    children: list[psutil.Process] = []
    with suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None  # noqa: S101 - pipes were asked for
        pipe.close()


def _ending(code: int) -> tuple[Ended, int]:
    """Return how a command ended; of a program in a shell or a sandbox a signal is 128 and its number."""
    number = -code if code < 0 else code - 128
    if code >= 0 and not 0 < number < signal.NSIG:
        return "exited", code
    if number == signal.SIGXCPU:
        return "time", 0
    return "killed", number
