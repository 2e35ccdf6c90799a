"""Interrupted derivations: whatever the moment, going on gives the bytes of a run that nothing disturbed."""

import subprocess
import sys

import pytest
from filelock import FileLock

from secateur.checkpoint.format import LOCK, STATE
from secateur.errors import ConfigError, OutputError
from tests.pruning.tiny_derivation import calibration, contents, derive_tiny, interrupt, shards
from tests.tiny import save_tiny

# Each child derives into BASE/../NAME and is killed by SIGKILL at its moment. One process forks them all, so that torch
# and transformers are imported once.
KILLER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from secateur.checkpoint import card, submodel
from secateur.models import safetensors_writer
from secateur.pruning import job, workspace
from tests.pruning.tiny_derivation import derive_tiny

base = Path(sys.argv[1])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(owner, name, call):
    real, calls = getattr(owner, name), []
    def counting(*arguments, **keywords):
        calls.append(1)
        return die() if len(calls) == call else real(*arguments, **keywords)
    setattr(owner, name, counting)

def die_instead_of_renaming():
    Path.rename = die

def die_after_renaming():
    def rename(self, target):
        os.rename(self, target)
        die()
    Path.rename = rename

def before_block(index):
    return {"progress": lambda stage, done, total: die() if (stage, done) == ("prune", index) else None}

MOMENTS = {
    "before block 0": lambda: before_block(0),
    "before block 1": lambda: before_block(1),
    "before block 2": lambda: before_block(2),
    "after block 2": lambda: before_block(3),
    "within the shard of block 1": lambda: die_at(safetensors_writer, "_bytes_of", 40),
    "within the outer shard": lambda: die_at(safetensors_writer, "_bytes_of", 3 * 27 + 2),
    "before the index": lambda: die_at(submodel, "_write_index", 1),
    "before the card": lambda: die_at(submodel, "model_card", 1),
    "before the log": lambda: die_at(job, "atomic_write_bytes", 1),
    "before the manifest": lambda: die_at(job, "atomic_write_bytes", 2),
    "before publishing": lambda: die_at(workspace.Workspace, "publish", 1),
    "before renaming": die_instead_of_renaming,
    "after renaming": die_after_renaming,
    "before the state": lambda: die_at(workspace, "atomic_write_bytes", 1),
}

for moment, prepare in MOMENTS.items():
    for options in ({}, {"propagate": False}) if moment == "before block 2" else ({},):
        child = os.fork()
        if child == 0:
            name = moment + ("" if options.get("propagate", True) else " of dense")
            derive_tiny(base, base.parent / name, **(prepare() or {}), **options)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""
# With how many shards finished.
MOMENTS = {
    "before the state": 0, "before block 0": 0, "before block 1": 1, "within the shard of block 1": 1,
    "before block 2": 2, "after block 2": 3, "within the outer shard": 3, "before the index": 4, "before the card": 4,
    "before the log": 4, "before the manifest": 4, "before publishing": 4, "before renaming": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("resume") / "base", "gemma3")


@pytest.fixture(scope="module")
def undisturbed(base):
    derive_tiny(base, base.parent / "undisturbed")
    return contents(base.parent / "undisturbed")


@pytest.fixture(scope="module")
def killed(base):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(base)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return base.parent


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bytes(base, killed, undisturbed, moment):
    out, partial = killed / moment, killed / f"{moment}.partial"
    assert not out.exists()
    assert partial.is_dir()
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(before) == MOMENTS[moment]
    with pytest.raises(OutputError, match="holds an interrupted derivation: add --resume"):
        derive_tiny(base, out)
    derive_tiny(base, out, resume=True)
    assert contents(out) == undisturbed
    assert not partial.exists()
    for name, written in before.items():  # a finished shard is not made again
        assert (out / name).stat().st_mtime_ns == written


def test_a_killed_run_on_dense_inputs_goes_on_to_the_same_bytes(base, killed, tmp_path):
    derive_tiny(base, tmp_path / "whole", propagate=False)
    derive_tiny(base, killed / "before block 2 of dense", propagate=False, resume=True)
    assert contents(killed / "before block 2 of dense") == contents(tmp_path / "whole")


def test_a_run_that_is_killed_once_it_is_published_is_finished(base, killed, undisturbed):
    out = killed / "after renaming"
    assert derive_tiny(base, out, resume=True).log == {}
    assert contents(out) == undisturbed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sparsity": 0.6}, r"recipe \(sparsity\), 0\.5 instead of 0\.6"),
        ({"method": "magnitude"}, r"recipe \(method\)"),
        ({"granularity": "per_layer"}, r"recipe \(granularity\)"),
        ({"propagate": False}, r"recipe \(propagate\)"),
        ({"calibration": calibration(seed=1)}, r"recipe \(seed\)"),
        ({"calibration": calibration(samples=4)}, r"recipe \(samples\)"),
    ],
)
def test_other_options_do_not_resume_and_cost_nothing(base, tmp_path, undisturbed, options, named):
    partial = interrupt(base, tmp_path / "out")
    before = shards(partial)
    assert len(before) == 2
    with pytest.raises(ConfigError, match=f"begun with another {named}.*same options to resume"):
        derive_tiny(base, tmp_path / "out", resume=True, **options)
    assert shards(partial) == before
    derive_tiny(base, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == undisturbed


def test_another_base_does_not_resume(base, tmp_path):
    partial = interrupt(base, tmp_path / "out")
    other = save_tiny(tmp_path / "other", "gemma3", seed=1)
    with pytest.raises(ConfigError, match=r"another base_model \(files\) \(model\.safetensors\)"):
        derive_tiny(other, tmp_path / "out", resume=True)
    assert len(shards(partial)) == 2


def test_resume_with_nothing_to_resume_starts_afresh(base, tmp_path, undisturbed):
    derive_tiny(base, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == undisturbed


def test_resume_of_a_finished_output_does_nothing(base, tmp_path):
    derive_tiny(base, tmp_path / "out")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").iterdir()}
    done = derive_tiny(base, tmp_path / "out", resume=True)
    assert done.log == {}
    assert "finished already" in done.describe()
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(OutputError, match=r"exists, made with another recipe \(sparsity\)"):
        derive_tiny(base, tmp_path / "out", resume=True, sparsity=0.7)
    with pytest.raises(OutputError, match="exists: name another one or delete it"):
        derive_tiny(base, tmp_path / "out")
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "out.partial").exists()


def test_a_foreign_output_is_never_touched(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    for resume in (False, True):
        with pytest.raises(OutputError, match="exists"):
            derive_tiny(base, tmp_path / "out", resume=resume)
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists"):
        derive_tiny(base, tmp_path / "link")


def test_a_foreign_partial_folder_is_never_touched(base, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.safetensors").write_text("x")
    for resume in (False, True):
        with pytest.raises(OutputError):
            derive_tiny(base, tmp_path / "out", resume=resume)
    assert (tmp_path / "out.partial" / "mine.safetensors").read_text() == "x"


def test_two_processes_do_not_share_a_folder(base, tmp_path, undisturbed):
    partial = interrupt(base, tmp_path / "out")
    before = shards(partial)
    with FileLock(partial / LOCK), pytest.raises(OutputError, match="another process derives into"):
        derive_tiny(base, tmp_path / "out", resume=True)
    assert shards(partial) == before
    assert (partial / STATE).exists()
    derive_tiny(base, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == undisturbed


def test_an_output_that_appears_meanwhile_is_not_replaced_and_costs_nothing(base, tmp_path, undisturbed):
    out = tmp_path / "out"

    def appear(stage, done, total):
        if stage == "prune" and done == total:
            out.mkdir()

    with pytest.raises(OutputError, match=r"appeared while .*the result is in .*out\.partial"):
        derive_tiny(base, out, progress=appear)
    assert list(out.iterdir()) == []
    assert len(shards(tmp_path / "out.partial")) == 4
    out.rmdir()
    derive_tiny(base, out, resume=True)
    assert contents(out) == undisturbed
