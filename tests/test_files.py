"""Files and folders appear whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from secateur import files
from secateur.errors import OutputError
from secateur.files import atomic_folder, atomic_write_bytes, cache_folder, new_file, sha256_file


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "a" / "b"))
    assert cache_folder() == tmp_path / "a" / "b" and cache_folder().is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SECATEUR_CACHE")
    assert cache_folder() == tmp_path / ".cache" / "secateur"
    (tmp_path / "file").touch()
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="SECATEUR_CACHE"):
        cache_folder()


def test_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with atomic_folder(target) as partial:
        assert partial.parent == target.parent and partial.name.startswith("out.partial-")
        (partial / "f").write_text("x")
        assert not target.exists()
    assert [file.name for file in target.iterdir()] == ["f"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_folder_vanishes_on_an_error(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as partial:
        (partial / "f").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("late", [False, True])
def test_an_existing_folder_is_never_replaced(late: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if not late:
        target.mkdir()
    with pytest.raises(OutputError, match="exists"), atomic_folder(target):
        target.mkdir()  # empty, which a bare rename would replace
    assert list(tmp_path.iterdir()) == [target] and list(target.iterdir()) == []


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with new_file(target) as partial:
        partial.write_text("x")
        assert not target.exists()
    assert target.read_text() == "x" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_file_vanishes_on_an_error(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises((ValueError, KeyboardInterrupt, OutputError)) as caught, new_file(tmp_path / "new" / "out"):
        raise error
    assert not isinstance(error, OSError) or "No space left" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("late", [False, True])
def test_an_existing_file_is_never_replaced(late: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if not late:
        target.write_text("mine")
    with pytest.raises(OutputError, match="exists"), new_file(target) as partial:
        partial.write_text("ours")
        target.write_text("mine")
    assert list(tmp_path.iterdir()) == [target] and target.read_text() == "mine"


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot create"), atomic_folder(tmp_path / "file" / "out"):
        pass


def test_write_bytes_replaces_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    atomic_write_bytes(path, b"old")
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        atomic_write_bytes(path, b"newer")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
