"""Runs jobs in sandboxes, some at a time."""

import os
import queue
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from secateur.errors import SandboxError
from secateur.evaluation.sandbox.box import Job, bubblewrap, confined, environment_in
from secateur.evaluation.sandbox.groups import find_groups
from secateur.evaluation.sandbox.processes import Finished, watched

_SLOTS = 64
_ANSWER = "in the box"


class Runner(Protocol):
    """Runs a job and says how it ended."""

    def run(self, job: Job) -> Finished:
        """Run a job to its end or its limits; may be called from several threads."""


class Sandbox:
    """Runs each job in a sandbox of its own, which is gone with everything in it when the job ends.

    Where this machine lets us make control groups each job gets one, which bounds memory and processes as the kernel
    counts them; `groups` says where they are made, None that there are none.

    Raises
    ------
    SandboxError
        When this machine cannot give one: that is tried with a program that does nothing.
    """

    def __init__(self) -> None:
        bubblewrap()
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(_SLOTS):
            self._slots.put(slot)
        self.groups = find_groups()
        tried = self._tried()
        if self.groups is not None and tried.output.strip() != _ANSWER:
            self.groups = None  # they may look as if they could be had, and cannot
            tried = self._tried()
        if tried.output.strip() != _ANSWER:
            raise SandboxError(
                f"this machine gives no sandbox ({tried.errors.strip() or tried.ended}); it takes a recent bubblewrap, "
                "and for anybody but root user namespaces that the system allows, which containers often do not"
            )

    def _tried(self) -> Finished:
        return self.run(Job(("/bin/sh", "-c", f"echo {_ANSWER}")))

    def run(self, job: Job) -> Finished:
        """Run a job; `failed` is how it ended where its sandbox could not be set up, twice."""
        slot = self._slots.get()
        try:
            finished = self._run(job, slot)
            return finished if finished.ended != "failed" else self._run(job, slot)
        finally:
            self._slots.put(slot)

    def _run(self, job: Job, slot: int) -> Finished:
        with ExitStack() as stack:
            box = stack.enter_context(confined(job, slot))
            command, group = box.command, None
            if self.groups is not None:
                try:
                    group = stack.enter_context(self.groups.group(slot, job.limits))
                except OSError as error:
                    return Finished("failed", 0, "", f"{error}", 0.0)
                command = group.joining(command)
            # What bubblewrap gets a program can read of it: nothing of ours.
            finished = watched(
                command, job.limits, given=job.input, inherited=box.inherited, environment={"PATH": os.defpath}
            )
            killed = None if group is None else group.memory_kill()
            if killed == "ours":
                return replace(finished, ended="memory", code=0)
            # The machine had no memory for it, or it never ran.
            if killed or (finished.ended in {"exited", "killed"} and not box.was_entered()):
                return replace(finished, ended="failed")
            return finished


class Unconfined:
    """Runs jobs with their limits and without a sandbox: whatever a program does, it does to this machine."""

    def run(self, job: Job) -> Finished:
        """Run a job in a folder that is removed afterwards."""
        folder = Path(tempfile.mkdtemp(prefix="secateur-unconfined-"))
        try:
            for name, content in job.files.items():
                (folder / name).write_bytes(content)
            environment = {"PATH": os.environ.get("PATH", os.defpath), **environment_in(str(folder))}
            command = [*job.limits.prlimit(processes=False), *job.command]
            return watched(command, job.limits, given=job.input, folder=folder, environment=environment)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
