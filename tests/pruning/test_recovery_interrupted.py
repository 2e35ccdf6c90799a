"""Recovery that is interrupted, and whose files are damaged, goes on to the same bytes."""

import errno
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import secateur  # noqa: F401 - registers the format
from secateur.checkpoint.format import PRUNED, PRUNED_WHOLE, RECOVERY
from secateur.errors import OutputError
from secateur.pruning import recovery
from secateur.pruning.job import Job
from tests.pruning.tiny_derivation import Interrupt, contents, derive_tiny, masks_and_weights
from tests.pruning.tiny_recovery import TEXT, recovery_base, small_steps  # noqa: F401 - fixtures

VALUES = [{}, {"values": "int8"}, {"values": "int4", "method": "admm"}]


def save_always(monkeypatch):
    monkeypatch.setattr(recovery, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(recovery, "_SAVE_SHARE", math.inf)


def interrupted(base, out, moment, **options):
    def stop(stage, done, _):
        if (stage, done) == moment:
            raise Interrupt

    with pytest.raises(Interrupt):
        derive_tiny(base, out, recovery=TEXT, progress=stop, **options)


@pytest.mark.parametrize("likely", [40, 16384], ids=["few tokens", "all tokens"])
@pytest.mark.parametrize("options", VALUES, ids=["base", "int8", "int4"])
@pytest.mark.parametrize("moment", [("prune", 1), ("recover", 0), ("recover", 4), ("recover", 6)])
def test_an_interrupted_recovery_goes_on_to_the_same_bytes(base, tmp_path, monkeypatch, options, moment, likely):
    monkeypatch.setattr("secateur.pruning.likely_tokens.LIKELIEST", likely)
    derive_tiny(base, tmp_path / "whole", recovery=TEXT, **options)
    save_always(monkeypatch)
    interrupted(base, tmp_path / "out", moment, **options)
    partial = tmp_path / "out.partial"
    assert (partial / RECOVERY).exists() == (moment[1] > 1)
    steps = []
    watch = lambda stage, done, _: steps.append(done) if stage == "recover" else None  # noqa: E731
    derive_tiny(base, tmp_path / "out", recovery=TEXT, resume=True, progress=watch, **options)
    assert steps[0] == (moment[1] if moment[0] == "recover" else 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not {PRUNED, RECOVERY} & {path.name for path in (tmp_path / "out").iterdir()}


def test_a_damaged_shard_is_made_again(base, tmp_path, monkeypatch):
    derive_tiny(base, tmp_path / "whole", recovery=TEXT)
    save_always(monkeypatch)
    interrupted(base, tmp_path / "out", ("recover", 3))
    shard = min((tmp_path / "out.partial" / PRUNED).iterdir())
    shard.write_bytes(shard.read_bytes()[:1000])
    derive_tiny(base, tmp_path / "out", recovery=TEXT, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def rewrite(change):
    """Return what changes the tensors and the metadata of a state."""

    def damage(path):
        with safe_open(path, framework="pt") as file:
            said, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        save_file(tensors, path, change(tensors, said))

    return damage


def without_metadata(tensors, said):
    return None


def another_length(tensors, said):
    return {**said, "steps": "7"}


def beyond_the_end(tensors, said):
    return {**said, "step": "7"}


def no_number(tensors, said):
    return {**said, "step": "three"}


def one_less(tensors, said):
    tensors.popitem()
    return said


def another_shape(tensors, said):
    name = next(iter(tensors))
    tensors[name] = torch.zeros(1)
    return said


def not_finite(tensors, said):
    next(iter(tensors.values())).view(-1)[0] = math.nan
    return said


CHANGES = [without_metadata, another_length, beyond_the_end, no_number, one_less, another_shape, not_finite]


@pytest.mark.parametrize("damage", [cut, *map(rewrite, CHANGES)], ids=["cut", *(one.__name__ for one in CHANGES)])
def test_a_damaged_state_is_made_again(base, tmp_path, monkeypatch, damage):
    derive_tiny(base, tmp_path / "whole", recovery=TEXT)
    save_always(monkeypatch)
    interrupted(base, tmp_path / "out", ("recover", 3))
    damage(tmp_path / "out.partial" / RECOVERY)
    steps = []
    watch = lambda stage, done, _: steps.append(done) if stage == "recover" else None  # noqa: E731
    derive_tiny(base, tmp_path / "out", recovery=TEXT, resume=True, progress=watch)
    assert steps[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["_write_learnt", "_finish"])
def test_what_is_learnt_is_not_learnt_again(base, tmp_path, monkeypatch, moment):
    """Killed when the last block was to be written, and when all were and the state was gone already."""
    derive_tiny(base, tmp_path / "whole", recovery=TEXT)
    real, calls = getattr(Job, moment), []

    def stop(job, *arguments):
        calls.append(1)
        if len(calls) == (len(job.base.blocks) if moment == "_write_learnt" else 1):
            raise Interrupt
        return real(job, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Job, moment, stop)
        with pytest.raises(Interrupt):
            derive_tiny(base, tmp_path / "out", recovery=TEXT)
    if moment == "_finish":
        (tmp_path / "out.partial" / RECOVERY).unlink()
    stages = set()
    derive_tiny(base, tmp_path / "out", recovery=TEXT, resume=True, progress=lambda stage, *_: stages.add(stage))
    assert "prune" not in stages
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_error_in_recovery_leaves_what_is_pruned(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "distil", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            derive_tiny(base, tmp_path / "out", recovery=TEXT)
    assert (tmp_path / "out.partial" / PRUNED_WHOLE).exists()
    stages = set()
    derive_tiny(base, tmp_path / "out", recovery=TEXT, resume=True, progress=lambda stage, *_: stages.add(stage))
    assert "prune" not in stages


def test_a_full_disk_while_the_state_is_saved(base, tmp_path, monkeypatch):
    derive_tiny(base, tmp_path / "whole", recovery=TEXT)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "write_safetensors", full)
        with pytest.raises(OutputError, match=r"the disk is full.*--resume"):
            derive_tiny(base, tmp_path / "out", recovery=TEXT)
    derive_tiny(base, tmp_path / "out", recovery=TEXT, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_disk_that_an_interrupted_run_has_taken_is_not_asked_for_again(base, tmp_path, monkeypatch):
    save_always(monkeypatch)
    interrupted(base, tmp_path / "out", ("recover", 3))
    partial = tmp_path / "out.partial"
    taken = sum(path.stat().st_size for path in [*(partial / PRUNED).glob("*.safetensors"), partial / RECOVERY])
    said = []
    for name in ("anew", "out"):
        options = {"announce": said.append, "resume": name == "out"}
        derive_tiny(base, tmp_path / name, recovery=TEXT, **options)
    anew, resumed = (float(line.split()[-7]) * 1e6 for line in said if line.startswith("needs"))
    assert anew - resumed == pytest.approx(taken, abs=1e6)


@pytest.mark.parametrize(
    "options",
    [{"method": "magnitude"}, {"propagate": False}, {"sparsity": 0.0}, {"method": "admm", "propagate": False}],
    ids=["without data", "dense inputs", "nothing removed", "admm on dense inputs"],
)
def test_whatever_was_pruned_learns(base, tmp_path, monkeypatch, options):
    save_always(monkeypatch)
    derive_tiny(base, tmp_path / "whole", recovery=TEXT, **options)
    interrupted(base, tmp_path / "out", ("recover", 4), **options)
    derive_tiny(base, tmp_path / "out", recovery=TEXT, resume=True, threads=2, **options)  # goes on with one thread
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    derive_tiny(base, tmp_path / "pruned", **options)
    one, other = masks_and_weights(tmp_path / "whole"), masks_and_weights(tmp_path / "pruned")
    for name in one:
        assert torch.equal(one[name][0], other[name][0])
        if options.get("sparsity") != 0:  # a model that is its parent has nothing to learn
            assert not torch.equal(one[name][1], other[name][1])
