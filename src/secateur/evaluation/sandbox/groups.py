"""Control groups for programs, where this machine lets us make some: the kernel's own account of memory and processes.

What a watcher sees of processes is not all that they use: pages of the kernel, of files in memory, of pipes count here.
"""

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from secateur.evaluation.sandbox.limits import Limits, MiB
from secateur.resources import CGROUP_ROOT, PROC_CGROUP

_NAME = "secateur-program"
_SPARE_PROCESSES = 8  # bubblewrap's own, and what starts it
_SPARE_MEMORY = 64 * MiB  # of the kernel and of bubblewrap
_PATIENCE = 2.0  # seconds in which what was killed is gone
# Joins groups, then becomes the command.
_JOIN = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo 0 > "$1/cgroup.procs" || exit 1; n=$((n-1)); shift; done; exec "$@"'


@dataclass(frozen=True)
class Group:
    """Folders of the control groups that a program runs in: one in version 2, in version 1 one for each controller."""

    folders: tuple[Path, ...]

    def joining(self, command: Sequence[str]) -> list[str]:
        """Return a command that joins and then becomes the given one."""
        return ["/bin/sh", "-c", _JOIN, "sh", str(len(self.folders)), *map(str, self.folders), *command]

    def memory_kill(self) -> Literal["ours", "of others"] | None:
        """Return whether the kernel has killed a process for memory, and whose limit it was that was passed."""
        folder = self.folders[0]
        if events := _counts(folder / "memory.events"):  # version 2: `oom` is how often this limit left nothing
            passed = events.get("oom", 0) > 0
        else:  # version 1 counts failures in several places or nowhere, but knows the peak
            events = _counts(folder / "memory.oom_control")
            peak, limit = (_number(folder / f"memory.{name}_in_bytes") for name in ("max_usage", "limit"))
            passed = peak >= limit - MiB
        if not events.get("oom_kill", 0):
            return None
        return "ours" if passed else "of others"

    def end(self) -> None:
        """Kill what is left in it, and remove it; what cannot be removed yet is left for another run to remove."""
        deadline = time.monotonic() + _PATIENCE
        for folder in self.folders:
            while folder.exists() and time.monotonic() < deadline:
                with suppress(OSError):
                    (folder / "cgroup.kill").write_text("1") if (folder / "cgroup.kill").exists() else _kill(folder)
                with suppress(OSError):
                    folder.rmdir()
                    break
                time.sleep(0.005)


@dataclass(frozen=True)
class Groups:
    """Where groups can be made: folders in which each program gets one, with what limits memory and processes there.

    `token` tells the groups of one sandbox from those of any other, of this process or in another container.
    """

    memory: Path
    processes: Path
    version: int
    token: str = field(default_factory=lambda: secrets.token_hex(4), compare=False)

    @contextmanager
    def group(self, slot: int, limits: Limits) -> Iterator[Group]:
        """Give a new group with limits; `slot` is a number that no other running program has."""
        name = f"{_NAME}-{os.getpid()}-{slot}-{self.token}"
        folders = tuple(dict.fromkeys((self.memory / name, self.processes / name)))
        group = Group(folders)
        group.end()  # of an earlier program in this slot, should that not have been possible then
        try:
            for folder in folders:
                folder.mkdir()
            most = str(limits.memory + limits.files + _SPARE_MEMORY)
            if self.version == 2:
                _write(folders[0] / "memory.max", most)
                _write(folders[0] / "memory.swap.max", "0", optional=True)
                _write(folders[0] / "memory.oom.group", "1", optional=True)
            else:
                _write(folders[0] / "memory.limit_in_bytes", most)
                _write(folders[0] / "memory.memsw.limit_in_bytes", most, optional=True)
            _write(folders[-1] / "pids.max", str(limits.processes + _SPARE_PROCESSES))
            yield group
        finally:
            group.end()


def find_groups(root: Path = CGROUP_ROOT, own: Path = PROC_CGROUP) -> Groups | None:
    """Return where groups can be made, or None; what earlier runs that were killed have left there is removed."""
    groups = _candidate(root, own)
    if groups is None:
        return None
    for folder in (*groups.memory.glob(f"{_NAME}-*"), *groups.processes.glob(f"{_NAME}-*")):
        pid = folder.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(folder)
    return groups


def _candidate(root: Path, own: Path) -> Groups | None:
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        return None
    if shutil.which("sh") is None:
        return None
    names = {controller: line[2] for line in lines if len(line) == 3 for controller in line[1].split(",")}
    if (root / "cgroup.controllers").exists():
        # One with processes has no groups with controllers in it, but the root. So beside our own, unless that has
        # limits of its own, which programs are not to leave.
        mine = root / names.get("", "/").strip("/")
        for folder in (mine, *(() if _is_limited(mine) else (mine.parent,))):
            if folder.is_relative_to(root) and _has_controllers(folder) and _writable(folder):
                return Groups(folder, folder, 2)
        return None
    if not {"memory", "pids"} <= set(names):
        return None
    memory, processes = (root / one / names[one].strip("/") for one in ("memory", "pids"))
    return Groups(memory, processes, 1) if _writable(memory) and _writable(processes) else None


def _has_controllers(folder: Path) -> bool:
    with suppress(OSError):
        return {"memory", "pids"} <= set((folder / "cgroup.subtree_control").read_text().split())
    return False


def _is_limited(folder: Path) -> bool:
    for name in ("memory.max", "memory.high", "memory.swap.max", "cpu.max"):
        with suppress(OSError):
            if not (folder / name).read_text().startswith("max"):
                return True
    return False


def _counts(path: Path) -> dict[str, int]:
    with suppress(OSError, ValueError):
        return {name: int(count) for name, count in (line.split() for line in path.read_text().splitlines())}
    return {}


def _number(path: Path) -> int:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK)


def _write(path: Path, text: str, *, optional: bool = False) -> None:
    if optional and not path.exists():
        return
    path.write_text(text)


def _kill(folder: Path) -> None:
    for pid in (folder / "cgroup.procs").read_text().split():
        if pid != "0":  # which is one that is not to be seen from here
            with suppress(psutil.Error):
                psutil.Process(int(pid)).kill()


def _remove(folder: Path) -> None:
    """Remove a group whose secateur was killed, with what that has left: bubblewrap may be left while it sets up."""
    for _ in range(20):
        with suppress(OSError):
            _kill(folder)
            folder.rmdir()
        if not folder.exists():
            return
        time.sleep(0.005)
