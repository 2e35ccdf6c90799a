"""What this process may still use, from files like those of control groups."""

from pathlib import Path

import psutil
import pytest

from secateur import resources
from secateur.resources import available_memory, usable_processors


def group(folder: Path, names: tuple[str, str], limit: str, usage: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(resources, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(resources, "PROC_CGROUP", tmp_path / "cgroup")
    return tmp_path


def test_memory_is_capped_by_the_group_and_those_above(root: Path) -> None:
    (root / "cgroup").write_text("0::/a/b\n")
    group(root / "a" / "b", V2, "max", 5, "inactive_file 1\n")
    group(root / "a", V2, "9000", 5000, "anon 1\ninactive_file 1500\n")
    assert available_memory() == 9000 - 5000 + 1500
    group(root / "a" / "b", V2, "6000", 5000, "")
    assert available_memory() == 1000
    group(root / "a" / "b", V2, "6000", 7000, "")
    assert available_memory() == 0


def test_memory_under_version_1(root: Path) -> None:
    (root / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/docker/host-only-name\n1:name=systemd:/x\n")
    group(root / "memory", V1, "10000", 4000, "cache 7\ntotal_inactive_file 200\n")
    assert available_memory() == 6200


def test_memory_without_a_limit_is_what_the_machine_has(root: Path) -> None:
    assert abs(available_memory() - psutil.virtual_memory().available) < 1 << 30
    (root / "cgroup").write_text("nonsense\n0::/gone\n")
    assert abs(available_memory() - psutil.virtual_memory().available) < 1 << 30


@pytest.mark.parametrize(("quota", "count"), [("max 100000", 6), ("250000 100000", 3), ("20000 100000", 1), ("x", 6)])
def test_processors_are_those_of_the_quota(root: Path, monkeypatch: pytest.MonkeyPatch, quota: str, count: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    (root / "cgroup").write_text("0::/a/b\n")
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "cpu.max").write_text(f"{quota}\n")
    (root / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert usable_processors() == count


@pytest.mark.parametrize(("quota", "count"), [("-1", 6), ("150000", 2)])
def test_processors_under_version_1(root: Path, monkeypatch: pytest.MonkeyPatch, quota: str, count: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    (root / "cgroup").write_text("4:memory:/\n2:cpu:/box\n")
    (root / "cpu" / "box").mkdir(parents=True)
    (root / "cpu" / "box" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (root / "cpu" / "box" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_processors() == count
