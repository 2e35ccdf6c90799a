"""Runs jobs in sandboxes, some at a time."""

import os
import queue
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from secateur.errors import SandboxError
from secateur.evaluation.sandbox.box import Job, bubblewrap, confined, environment_in
from secateur.evaluation.sandbox.processes import Finished, watched

_SLOTS = 64
_ANSWER = "in the box"


class Runner(Protocol):
    """Runs a job and says how it ended."""

    def run(self, job: Job) -> Finished:
        """Run a job to its end or its limits; may be called from several threads."""


class Sandbox:
    """Runs each job in a sandbox of its own, which is gone with everything in it when the job ends.

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
        tried = self.run(Job(("/bin/sh", "-c", f"echo {_ANSWER}")))
        if tried.output.strip() != _ANSWER:
            raise SandboxError(
                f"this machine gives no sandbox ({tried.errors.strip() or tried.ended}); it takes a recent bubblewrap, "
                "and for anybody but root user namespaces that the system allows, which containers often do not"
            )

    def run(self, job: Job) -> Finished:
        """Run a job; `failed` is how it ended where its sandbox could not be set up, twice."""
        slot = self._slots.get()
        try:
            for _ in range(2):
                with confined(job, slot) as (command, inherited):
                    # What bubblewrap gets a program can read of it: nothing of ours.
                    finished = watched(
                        command, job.limits, given=job.input, inherited=inherited, environment={"PATH": os.defpath}
                    )
                # A program can write such a line too, and only says so that it has failed.
                if not (finished.code == 1 and finished.errors.startswith("bwrap: ")):
                    return finished
        finally:
            self._slots.put(slot)
        return replace(finished, ended="failed")


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
