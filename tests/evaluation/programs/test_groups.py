"""Control groups: real ones where this machine has them, and the files that would be written on one of either kind."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from secateur.evaluation.sandbox import groups, running
from secateur.evaluation.sandbox.box import Job
from secateur.evaluation.sandbox.groups import Group, Groups, find_groups
from secateur.evaluation.sandbox.limits import Limits, MiB
from secateur.evaluation.sandbox.running import Sandbox

# Fills a hundred sockets of each of 24 processes, 200 kB each: memory of the kernel, which belongs to no process.
SOCKETS = b"""
import os, socket, time
for _ in range(24):
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
for _ in range(24):
    os.wait()
"""


@pytest.fixture
def grouped(sandbox: Sandbox) -> Sandbox:
    """A sandbox with control groups."""
    if sandbox.groups is None:
        pytest.skip("this machine lets us make no control groups")
    return sandbox


def left(place: Groups) -> list[Path]:
    """The groups of one sandbox: others, in another process, have theirs beside them."""
    name = f"secateur-program-*-{place.token}"
    return [*place.memory.glob(name), *place.processes.glob(name)]


def test_memory_of_the_kernel_counts(grouped, toolchain_of):
    python = toolchain_of("python")

    def ended(source):
        command = (str(python.command), "-S", "fill.py")
        return grouped.run(Job(command, {"fill.py": source}, b"", python.folders, Limits(memory=300 * MiB))).ended

    assert ended(SOCKETS) == "memory"
    assert left(grouped.groups) == []
    assert ended(SOCKETS.replace(b"range(24)", b"range(3)")) == "exited"


def test_what_a_kill_has_left_is_removed(grouped):
    place = grouped.groups
    gone = next(pid for pid in range(2**22 - 1, 1, -1) if not psutil.pid_exists(pid))
    stale = [folder / f"secateur-program-{gone}-0-ab" for folder in (place.memory, place.processes)]
    for folder in stale:
        folder.mkdir(exist_ok=True)
    orphan = subprocess.Popen(Group(tuple(stale)).joining(["/bin/sleep", "60"]))
    while str(orphan.pid) not in (stale[-1] / "cgroup.procs").read_text().split():
        time.sleep(0.01)
    assert find_groups() == place
    assert orphan.wait(10) == -9
    assert find_groups() == place
    assert not any(folder.exists() for folder in stale)


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
        assert group.memory_kill() is None
        (folder / "memory.events").write_text("low 0\nmax 7\noom 1\noom_kill 2\n")
        assert group.memory_kill() == "ours"
        (folder / "memory.events").write_text("low 0\nmax 0\noom 0\noom_kill 1\n")
        assert group.memory_kill() == "of others"
        command = group.joining(["true"])
        assert (command[0], command[4:]) == ("/bin/sh", ["1", str(folder), "true"])


@pytest.mark.parametrize(("name", "limit"), [("memory.max", "4294967296"), ("cpu.max", "200000 100000")])
def test_programs_do_not_leave_limits_that_are_our_own(tmp_path, name, limit):
    own = second(tmp_path)
    mine = tmp_path / "user.slice" / "app.slice" / "terminal.scope"
    (mine / name).write_text("max 100000\n")
    assert find_groups(tmp_path, own) is not None
    (mine / name).write_text(f"{limit}\n")
    assert find_groups(tmp_path, own) is None


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
        (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
        (memory / "memory.max_usage_in_bytes").write_text(f"{100 * MiB}\n")
        assert group.memory_kill() == "of others"
        (memory / "memory.max_usage_in_bytes").write_text(f"{184 * MiB}\n")
        assert group.memory_kill() == "ours"
    (tmp_path / "own").write_text("4:memory:/box\n")
    assert find_groups(tmp_path, tmp_path / "own") is None


class Pretended(Groups):
    """Groups that are folders like any other, so that no process can join them."""

    joinable = False

    @contextmanager
    def group(self, slot, limits):
        folder = self.memory / str(slot)
        (folder / "cgroup.procs").mkdir(parents=True, exist_ok=True)
        if self.joinable:
            (folder / "cgroup.procs").rmdir()
        yield Group((folder,))


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("there", [True, False])
def test_groups_that_cannot_be_joined_are_done_without(tmp_path, monkeypatch, there):
    monkeypatch.setattr(groups, "_PATIENCE", 0.0)
    kind = Pretended if there else Groups
    monkeypatch.setattr(running, "find_groups", lambda: kind(tmp_path / "none", tmp_path / "none", 2))
    box = Sandbox()
    assert box.groups is None
    assert box.run(Job(("/bin/echo", "runs"))).output == "runs\n"


@pytest.mark.parametrize("kind", [Groups, Pretended])
def test_a_group_that_cannot_be_had_later_is_a_failed_sandbox(sandbox, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sandbox, "groups", kind(tmp_path / "none", tmp_path / "none", 2))
    assert sandbox.run(Job(("/bin/true",))).ended == "failed"


@pytest.mark.parametrize(("counts", "ended"), [("oom 1\noom_kill 1", "memory"), ("oom 0\noom_kill 1", "failed")])
def test_what_the_kernel_has_killed_for_memory(sandbox, tmp_path, monkeypatch, counts, ended):
    monkeypatch.setattr(sandbox, "groups", Pretended(tmp_path, tmp_path, 2))
    monkeypatch.setattr(Pretended, "joinable", True)
    for slot in range(64):
        (tmp_path / str(slot)).mkdir()
        (tmp_path / str(slot) / "memory.events").write_text(f"{counts}\n")
    assert sandbox.run(Job(("/bin/sh", "-c", "kill -9 $$"))).ended == ended


def test_two_sandboxes_do_not_know_each_other(grouped):
    one, other = Sandbox(), Sandbox()
    with ThreadPoolExecutor(1) as pool:
        sleeping = pool.submit(one.run, Job(("/bin/sleep", "1")))
        while not left(one.groups):
            time.sleep(0.01)
        assert other.run(Job(("/bin/true",))).ended == "exited"
        assert sleeping.result().ended == "exited"
