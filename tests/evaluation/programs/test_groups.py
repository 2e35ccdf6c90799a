"""Control groups: real ones where this machine has them, and the files that would be written on one of either kind."""

from pathlib import Path

import psutil
import pytest

from secateur.evaluation.sandbox import groups, running
from secateur.evaluation.sandbox.box import Job
from secateur.evaluation.sandbox.groups import Groups, find_groups
from secateur.evaluation.sandbox.limits import Limits, MiB
from secateur.evaluation.sandbox.running import Sandbox

# Fills sockets of 40 processes, 200 kB each: memory of the kernel, which belongs to no process.
SOCKETS = b"""
import os, socket, time
for _ in range(40):
    if os.fork() == 0:
        kept = []
        for _ in range(100):
            pair = socket.socketpair()
            kept.append(pair)
            pair[0].setblocking(False)
            try:
                while True:
                    pair[0].send(b"x" * 65536)
            except BlockingIOError:
                pass
        time.sleep(1)
        os._exit(0)
for _ in range(40):
    os.wait()
"""


@pytest.fixture
def grouped(sandbox: Sandbox) -> Sandbox:
    """A sandbox with control groups."""
    if sandbox.groups is None:
        pytest.skip("this machine lets us make no control groups")
    return sandbox


def left(place: Groups) -> list[Path]:
    return [*place.memory.glob("secateur-program-*"), *place.processes.glob("secateur-program-*")]


def test_memory_of_the_kernel_counts(grouped, toolchain_of):
    python = toolchain_of("python")

    def ended(source):
        command = (str(python.command), "-S", "fill.py")
        return grouped.run(Job(command, {"fill.py": source}, b"", python.folders, Limits(memory=512 * MiB))).ended

    assert ended(SOCKETS) == "memory"
    assert left(grouped.groups) == []
    assert ended(SOCKETS.replace(b"range(40)", b"range(3)")) == "exited"


def test_what_a_kill_has_left_is_removed(grouped):
    place = grouped.groups
    gone = next(pid for pid in range(2**22 - 1, 1, -1) if not psutil.pid_exists(pid))
    for folder in (place.memory, place.processes):
        (folder / f"secateur-program-{gone}-0").mkdir(exist_ok=True)
    assert find_groups() == place
    assert left(place) == []


def second(root: Path, own: str = "/user.slice/app.slice/terminal.scope", controllers: str = "cpu memory pids") -> Path:
    """Make files as those of version 2, with `controllers` where the parent of our group has them."""
    mine = root / own.strip("/")
    mine.mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    for folder in (mine, mine.parent):
        (folder / "cgroup.procs").touch()
        (folder / "cgroup.subtree_control").write_text("" if folder == mine else f"{controllers}\n")
    path = root / "own"
    path.write_text(f"0::{own}\n")
    return path


def test_in_version_2_groups_are_made_beside_our_own(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "_PATIENCE", 0.0)  # these folders have files, and cannot be removed like real ones
    found = find_groups(tmp_path, second(tmp_path))
    beside = tmp_path / "user.slice" / "app.slice"
    assert found == Groups(beside, beside, 2)
    with found.group(3, Limits(memory=100 * MiB, processes=9, files=20 * MiB)) as group:
        (folder,) = group.folders
        assert folder.parent == beside
        assert (folder / "memory.max").read_text() == str(184 * MiB)
        assert (folder / "pids.max").read_text() == "17"
        assert not group.had_no_memory()
        (folder / "memory.events").write_text("low 0\nmax 7\noom 1\noom_kill 2\n")
        assert group.had_no_memory()
        command = group.joining(["true"])
        assert (command[0], command[4:]) == ("/bin/sh", ["1", str(folder), "true"])


@pytest.mark.parametrize("controllers", ["cpu", "memory", "pids"])
def test_without_both_controllers_there_are_no_groups(tmp_path, controllers):
    assert find_groups(tmp_path, second(tmp_path, controllers=controllers)) is None


def test_in_version_1_each_controller_has_a_group(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "_PATIENCE", 0.0)
    for folder in (tmp_path / "memory" / "box", tmp_path / "pids"):
        folder.mkdir(parents=True)
        (folder / "cgroup.procs").touch()
    (tmp_path / "own").write_text("8:pids:/\n4:memory:/box\n0::/\n")
    found = find_groups(tmp_path, tmp_path / "own")
    assert found == Groups(tmp_path / "memory" / "box", tmp_path / "pids", 1)
    with found.group(0, Limits(memory=100 * MiB, processes=9, files=20 * MiB)) as group:
        memory, processes = group.folders
        assert (memory / "memory.limit_in_bytes").read_text() == str(184 * MiB)
        assert (processes / "pids.max").read_text() == "17"
    (tmp_path / "own").write_text("4:memory:/box\n")
    assert find_groups(tmp_path, tmp_path / "own") is None


@pytest.mark.usefixtures("sandbox")
def test_groups_that_cannot_be_joined_are_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "_PATIENCE", 0.0)
    monkeypatch.setattr(running, "find_groups", lambda: Groups(tmp_path / "none", tmp_path / "none", 2))
    box = Sandbox()
    assert box.groups is None
    assert box.run(Job(("/bin/echo", "runs"))).output == "runs\n"


def test_a_group_that_cannot_be_had_later_is_a_failed_sandbox(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "groups", Groups(tmp_path / "none", tmp_path / "none", 2))
    assert sandbox.run(Job(("/bin/true",))).ended == "failed"
