"""What this process may still use of the machine: memory and processors, as far as its control groups let it."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Return the bytes of memory that this process can still take.

    That is what the machine has available, capped by what its control group (a container's limit, version 1 or 2,
    here or in any group above) leaves. Page cache that the kernel can drop counts as available.
    """
    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *_cgroup_headrooms()]))


def peak_memory() -> int:
    """Return the most memory that this process has had resident so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss it does not begin with the peak of the process that started this one
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(line[1]) * 1024 for line in lines if line[0] == "VmHWM:")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can be asked to (glibc).

    Its allocator keeps what large temporary tensors leave behind; over many of them that is several hundred megabytes.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def usable_processors() -> int:
    """Return the number of processors that this process may use, at least 1.

    Those that it may run on, or as many whole ones as its control group (a container's quota, version 1 or 2) gives it
    the time of, rounded up.
    """
    # There is no affinity on macOS.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _cgroup_processors())]))


def _cgroup_headrooms() -> Iterator[int]:
    """Yield limit minus usage of each control group with a memory limit that this process is in."""
    for group, version in _groups("memory"):
        if version == 2:
            limit, usage, cached = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        headroom = _headroom(group, limit, usage, cached)
        if headroom is not None:
            yield headroom


def _cgroup_processors() -> Iterator[float]:
    """Yield the processors whose time each control group with such a quota gives."""
    for group, version in _groups("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if version == 2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{one}_us").read_text().strip() for one in ("quota", "period"))
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the control groups of a controller that this process is in, with their version, from its own upwards."""
    try:
        lines = PROC_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers == "":
            root, version = CGROUP_ROOT, 2
        elif controller in controllers.split(","):
            root, version = CGROUP_ROOT / controller, 1
        else:
            continue
        # Inside a container the name may be that of the host, which does not exist here: its parents are tried as well.
        folder = root / name.strip("/")
        for group in (folder, *folder.parents):
            yield group, version
            if group == root:
                break


def _headroom(group: Path, limit: str, usage: str, cached: str) -> int | None:
    """Return limit - (usage - droppable page cache) in bytes, or None where the group has no limit."""
    try:
        most = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        if most == "max":
            return None
        statistics = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text().splitlines())
        return int(most) - used + int(statistics.get(cached, 0))
    except (OSError, ValueError):
        return None
