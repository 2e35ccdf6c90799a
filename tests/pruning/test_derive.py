"""What a derivation does when something is wrong: damaged weights, a full disk, too little memory, bad arguments."""

import errno

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.checkpoint.format import ACTIVATIONS
from secateur.config import PRESETS
from secateur.errors import ConfigError, ModelError, OutputError, ResourceError, SecateurError, UnknownNameError
from tests.pruning.tiny_derivation import calibration, contents, derive_tiny, interrupt, shards
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("derive") / "base", "llama")


@pytest.fixture(scope="module")
def undisturbed(base):
    derive_tiny(base, base.parent / "undisturbed")
    return contents(base.parent / "undisturbed")


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_an_error_in_the_middle_leaves_nothing(tmp_path, name, method):
    base = save_tiny(tmp_path / "base", "llama")
    weights = load_file(base / "model.safetensors")
    weights[name].view(-1)[5] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"'{name}' .*holds NaN"):
        derive_tiny(base, tmp_path / "out", method=method)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_missing_weight_is_found_before_the_work(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    stages = []
    with pytest.raises(ModelError, match=r"no weight 'lm_head\.weight'"):
        derive_tiny(base, tmp_path / "out", progress=lambda stage, *_: stages.append(stage))
    assert "prune" not in stages


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("at", [1, 30, 70])  # within the first shard, the second, and the one outside the blocks
def test_a_full_disk_leaves_what_is_finished(base, tmp_path, monkeypatch, undisturbed, at, code):
    from secateur.models import safetensors_writer

    real, calls = safetensors_writer._bytes_of, []

    def full(*arguments):
        calls.append(1)
        if len(calls) >= at:
            raise OSError(code, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_writer, "_bytes_of", full)
        with pytest.raises(OutputError, match=r"the disk is full.*--resume"):
            derive_tiny(base, tmp_path / "out")
    partial = tmp_path / "out.partial"
    assert len(shards(partial)) == {1: 0, 30: 1, 70: 3}[at]
    derive_tiny(base, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == undisturbed


def test_a_disk_full_while_finishing(base, tmp_path, monkeypatch, undisturbed):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("secateur.checkpoint.submodel.shutil.copyfile", full)
        with pytest.raises(OutputError, match=r"the disk is full.*--resume"):
            derive_tiny(base, tmp_path / "out")
    derive_tiny(base, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == undisturbed


def test_another_trouble_with_files_leaves_nothing(base, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("secateur.checkpoint.submodel.shutil.copyfile", fail)
    with pytest.raises((OSError, OutputError)):
        derive_tiny(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def make_memory(monkeypatch, n_bytes):
    monkeypatch.setattr("secateur.pruning.forecast.available_memory", lambda: n_bytes)


def forecast_of(base, tmp_path):
    """(working memory, activations) in bytes, from the real forecast."""
    from secateur.config import make_recipe
    from secateur.models.source import ModelFolder
    from secateur.pruning.base import Base
    from secateur.pruning.job import forecast_job

    recipe = make_recipe({"for": "python", "method": "wanda", "sequence_length": 48})
    opened, folder = Base.open(ModelFolder(base, "tiny")), tmp_path / "out.partial"
    found = forecast_job(opened, recipe, 5 * 48, None, 1, folder, device=torch.device("cpu"))
    return found.working_memory, found.activations


@pytest.mark.parametrize("propagate", [True, False])
def test_mapped_activations_give_the_same_bytes(base, tmp_path, monkeypatch, propagate):
    derive_tiny(base, tmp_path / "memory", propagate=propagate)
    working, activations = forecast_of(base, tmp_path)
    make_memory(monkeypatch, int((working + activations / 2) / 0.85))
    lines, seen = [], []

    def look(stage, *_):
        if stage == "prune":
            seen.append((tmp_path / "mapped.partial" / ACTIVATIONS).stat().st_size)

    derive_tiny(base, tmp_path / "mapped", propagate=propagate, announce=lines.append, progress=look)
    assert "in a mapped file" in lines[0]
    assert set(seen) == {5 * 48 * 64 * 2}
    assert contents(tmp_path / "mapped") == contents(tmp_path / "memory")


def test_mapped_activations_are_made_again_on_resume(base, tmp_path, monkeypatch, undisturbed):
    working, activations = forecast_of(base, tmp_path)
    make_memory(monkeypatch, int((working + activations / 2) / 0.85))
    partial = interrupt(base, tmp_path / "out")
    assert (partial / ACTIVATIONS).exists()
    derive_tiny(base, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == undisturbed


def test_what_does_not_fit_into_memory_is_refused(base, tmp_path, monkeypatch):
    working, _ = forecast_of(base, tmp_path)
    make_memory(monkeypatch, int(working / 0.85) - 100)
    with pytest.raises(ResourceError, match=r"one block of this model needs about .* of memory and .* are free"):
        derive_tiny(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_gram_matrices_are_counted_before_they_are_needed(base, tmp_path, monkeypatch):
    working, activations = forecast_of(base, tmp_path)
    make_memory(monkeypatch, int((working + activations) / 0.85) + 1000)
    derive_tiny(base, tmp_path / "wanda")
    with pytest.raises(ResourceError, match="one block of this model needs"):
        derive_tiny(base, tmp_path / "admm", method="admm")


def test_what_does_not_fit_onto_the_disk_is_refused(base, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("secateur.pruning.forecast.shutil.disk_usage", lambda _: usage(10**6, 10**6 - 10**5, 10**5))
    with pytest.raises(ResourceError, match=r"may need .* of disk and 0 MB are free at .*make room"):
        derive_tiny(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_on_resume_does_not_cost_the_finished_blocks(base, tmp_path, monkeypatch, undisturbed):
    partial = interrupt(base, tmp_path / "out")
    before = shards(partial)
    with monkeypatch.context() as patch:
        make_memory(patch, 1000)
        with pytest.raises(ResourceError):
            derive_tiny(base, tmp_path / "out", resume=True)
    assert shards(partial) == before
    derive_tiny(base, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == undisturbed


def test_a_preset_from_python_is_whole(base, tmp_path):
    recipe = derive_tiny(base, tmp_path / "best", preset="best", method=None).manifest["recipe"]
    assert {key: recipe[key] for key in PRESETS["best"]} == PRESETS["best"]
    recipe = derive_tiny(base, tmp_path / "uniform", preset="best", method=None, budget="uniform").manifest["recipe"]
    assert (recipe["method"], recipe["budget"]) == ("admm", "uniform")


@pytest.mark.parametrize("sparsity", [0.0, 0.999])
def test_the_ends_of_sparsity(base, tmp_path, sparsity):
    done = derive_tiny(base, tmp_path / "out", sparsity=sparsity)
    # 0.999 of rows of 64 and of 160 rounds to all of them.
    assert done.manifest["kept_weights"] == (done.manifest["prunable_weights"] if sparsity == 0 else 0)
    import secateur

    assert torch.isfinite(secateur.load(tmp_path / "out", engine="torch").model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ConfigError, "sparsity"),
        ({"sparsity": -0.1}, ConfigError, "sparsity"),
        ({"granularity": "per_row"}, ConfigError, "granularity"),
        ({"method": "wandaa"}, UnknownNameError, "did you mean 'wanda'"),
        ({"values": "int2"}, ConfigError, "'values' cannot be \"int2\""),
        ({"group_size": 64}, ConfigError, "'group_size' cannot be 64: only int8, int4 and nl4"),
        ({"values": "int4", "group_size": 48}, ConfigError, "'group_size' cannot be 48: input should be 32, 64 or 128"),
        ({"budget": "unifrom"}, UnknownNameError, "did you mean 'uniform'"),
        ({"device": "cudaa"}, ConfigError, "device 'cudaa'"),
        ({"calibration": calibration(2, 257)}, ConfigError, "257 is more than the 256"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(base, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        derive_tiny(base, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_tokens_beyond_the_vocabulary_are_refused(base, tmp_path):
    tokens = calibration()
    tokens.token_ids[0, 0] = 384
    with pytest.raises(ModelError, match="holds token 384, the model's vocabulary has 384"):
        derive_tiny(base, tmp_path / "out", calibration=tokens)


def test_an_output_that_cannot_be_written(base, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SecateurError, match=r"file|out"):
        derive_tiny(base, tmp_path / "file" / "out")


def test_the_number_of_torch_threads_is_given_back(base, tmp_path):
    before = torch.get_num_threads()
    derive_tiny(base, tmp_path / "out", threads=before + 1)
    assert torch.get_num_threads() == before
