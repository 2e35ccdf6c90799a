"""Control groups for programs, where this machine lets us make some: the kernel's own account of memory and processes.

What a watcher sees of processes is not all that they use: pages of the kernel, of files in memory, of pipes count here.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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

    def had_no_memory(self) -> bool:
        """Return whether the kernel has killed a process for memory."""
        for folder in self.folders:
            for name in ("memory.events", "memory.oom_control"):
                with suppress(OSError):
                    counts = dict(line.split() for line in (folder / name).read_text().splitlines())
                    if int(counts.get("oom_kill", 0)):
                        return True
        return False

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
    """Where groups can be made: folders in which each program gets one, with what limits memory and processes there."""

    memory: Path
    processes: Path
    version: int

    @contextmanager
    def group(self, slot: int, limits: Limits) -> Iterator[Group]:
        """Give a new group with limits; `slot` is a number that no other running program has."""
        name = f"{_NAME}-{os.getpid()}-{slot}"
        folders = tuple(dict.fromkeys((self.memory / name, self.processes / name)))
        group = Group(folders)
        group.end()  # of an earlier program, should it not have been possible then
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
            with suppress(OSError):
                folder.rmdir()
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
        # Beside the group that this process is in: one with processes has no groups with controllers in it.
        mine = root / names.get("", "/").strip("/")
        for folder in (mine.parent, mine):
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


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK)


def _write(path: Path, text: str, *, optional: bool = False) -> None:
    if optional and not path.exists():
        return
    path.write_text(text)


def _kill(folder: Path) -> None:
    for pid in (folder / "cgroup.procs").read_text().split():
        with suppress(psutil.Error):
            psutil.Process(int(pid)).kill()
