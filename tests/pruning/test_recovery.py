"""Recovery: gradients against autograd, what learns and what does not, interruptions, and what is written down."""

import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import secateur  # noqa: F401 - registers the format
from secateur.checkpoint.format import CARD, MANIFEST, PRUNED, RECOVERY, read_json
from secateur.checkpoint.inspect import inspect
from secateur.errors import ConfigError, ModelError, OutputError, ResourceError
from secateur.pruning import recovery
from secateur.pruning.recovery import distil, rate
from tests.pruning.tiny_derivation import Interrupt, calibration, contents, derive_tiny, masks_and_weights
from tests.tiny import save_tiny

TEXT = calibration(samples=12, seed=7)
VALUES = [{}, {"values": "int8"}, {"values": "int4", "method": "admm"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("recovery") / "base", "llama", dtype=torch.float32)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Six steps of two sequences instead of a single one."""
    monkeypatch.setattr(recovery, "STEP_TOKENS", 96)
    monkeypatch.setattr(recovery, "LEARNING_RATE", 3e-3)


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(model, parent, token_ids):
    """KL(parent || model) in nats at the mean position."""
    ours, theirs = (one(input_ids=token_ids).logits.double().log_softmax(-1) for one in (model, parent))
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()


def interrupted(base, out, moment, **options):
    def stop(stage, done, _):
        if (stage, done) == moment:
            raise Interrupt

    with pytest.raises(Interrupt):
        derive_tiny(base, out, recovery=TEXT, progress=stop, **options)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])  # gemma 2 caps its logits
def test_gradients_are_those_of_the_divergence(tmp_path, family):
    base = save_tiny(tmp_path / "base", family, dtype=torch.float32)
    derive_tiny(base, tmp_path / "sub")
    model, parent = opened(tmp_path / "sub"), opened(base)
    token_ids = torch.from_numpy(calibration().token_ids)
    loss = divergence(model, parent, token_ids)
    loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    # In two parts, which have to add up.
    for part in token_ids.split(3):
        distil(model, parent, part, positions=token_ids.numel())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-7, msg=name)


def test_the_mask_is_kept_and_the_divergence_falls(base, tmp_path):
    derive_tiny(base, tmp_path / "pruned")
    derive_tiny(base, tmp_path / "recovered", recovery=TEXT)
    pruned, recovered = masks_and_weights(tmp_path / "pruned"), masks_and_weights(tmp_path / "recovered")
    for name, (mask, weight) in recovered.items():
        assert torch.equal(mask, pruned[name][0])
        assert not torch.equal(weight, pruned[name][1])
        assert not weight[~mask].any()
    parent, token_ids = opened(base), torch.from_numpy(TEXT.token_ids)
    before, after = (divergence(opened(tmp_path / name), parent, token_ids).item() for name in ("pruned", "recovered"))
    assert after < 0.8 * before


def test_what_lies_outside_the_blocks_stays_the_parents(base, tmp_path):
    derive_tiny(base, tmp_path / "sub", recovery=TEXT)
    model, parent = opened(tmp_path / "sub"), opened(base)
    for name, parameter in parent.named_parameters():
        same = torch.equal(parameter, model.get_parameter(name))
        assert same == (not name.startswith("model.layers.")), name


@pytest.mark.parametrize("options", VALUES, ids=["base", "int8", "int4"])
@pytest.mark.parametrize("moment", [("prune", 1), ("recover", 0), ("recover", 4), ("recover", 6)])
def test_an_interrupted_recovery_goes_on_to_the_same_bytes(base, tmp_path, monkeypatch, options, moment):
    derive_tiny(base, tmp_path / "whole", recovery=TEXT, **options)
    monkeypatch.setattr(recovery, "_SAVE_SECONDS", 0.0)
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
    monkeypatch.setattr(recovery, "_SAVE_SECONDS", 0.0)
    interrupted(base, tmp_path / "out", ("recover", 3))
    shard = min((tmp_path / "out.partial" / PRUNED).iterdir())
    shard.write_bytes(shard.read_bytes()[:1000])
    derive_tiny(base, tmp_path / "out", recovery=TEXT, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_damaged_state_is_made_again(base, tmp_path, monkeypatch):
    derive_tiny(base, tmp_path / "whole", recovery=TEXT)
    monkeypatch.setattr(recovery, "_SAVE_SECONDS", 0.0)
    interrupted(base, tmp_path / "out", ("recover", 3))
    state = tmp_path / "out.partial" / RECOVERY
    state.write_bytes(state.read_bytes()[:1000])
    derive_tiny(base, tmp_path / "out", recovery=TEXT, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_integers_are_what_learnt(base, tmp_path, monkeypatch, values, sparsity):
    """The model that ran at the last step is the one that is stored, to the last bit."""
    seen = {}
    real = recovery.Pupil.round

    def noting(pupil):
        real(pupil)
        seen.update({name: pupil.model.get_parameter(name).detach().clone() for name in pupil.grids})

    monkeypatch.setattr(recovery.Pupil, "round", noting)
    derive_tiny(base, tmp_path / "sub", recovery=TEXT, values=values, sparsity=sparsity)
    stored = masks_and_weights(tmp_path / "sub")
    assert seen.keys() == stored.keys()
    for name, (mask, weight) in stored.items():
        assert torch.equal(weight, seen[name])
        assert (1 - mask.float().mean()).item() == pytest.approx(sparsity, abs=0.02)


def test_learning_makes_up_for_the_rounding(base, tmp_path):
    derive_tiny(base, tmp_path / "rounded", values="int4")
    derive_tiny(base, tmp_path / "learnt", recovery=TEXT, values="int4")
    parent, token_ids = opened(base), torch.from_numpy(TEXT.token_ids)
    before, after = (divergence(opened(tmp_path / name), parent, token_ids).item() for name in ("rounded", "learnt"))
    assert after < 0.8 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_of_the_base_is_kept(tmp_path, dtype):
    base = save_tiny(tmp_path / "base", "qwen2", dtype=dtype)
    derive_tiny(base, tmp_path / "sub", recovery=TEXT)
    tensors = [one for path in (tmp_path / "sub").glob("*.safetensors") for one in load_file(path).values()]
    assert {one.dtype for one in tensors if one.is_floating_point()} == {dtype}
    assert all(one.isfinite().all() for one in tensors)


def test_the_manifest_says_from_what_it_learnt(base, tmp_path):
    derive_tiny(base, tmp_path / "sub", recovery=TEXT)
    manifest = read_json(tmp_path / "sub" / MANIFEST)
    assert manifest["recipe"]["recover"] == 12 * 48
    assert manifest["recovery"]["sha256"] == TEXT.sha256
    assert manifest["recovery"]["samples"] == 12
    with pytest.raises(OutputError, match=r"made with another recovery \(sha256\)"):
        derive_tiny(base, tmp_path / "sub", recovery=calibration(samples=12, seed=8), resume=True)
    with pytest.raises(OutputError, match=r"made with another recipe \(recover\)"):
        derive_tiny(base, tmp_path / "sub", resume=True)
    told = [inspect(tmp_path / "sub").describe(), (tmp_path / "sub" / CARD).read_text()]
    derive_tiny(base, tmp_path / "other")
    assert "recovery" not in read_json(tmp_path / "other" / MANIFEST)
    others = [inspect(tmp_path / "other").describe(), (tmp_path / "other" / CARD).read_text()]
    for text, other in zip(told, others, strict=True):
        assert "12 x 48 tokens" in text
        assert TEXT.sha256[:16] in text
        assert "recovery" not in other
    assert "norms inside the blocks have learnt" in told[1]
    assert "norms are those of the parent" in others[1]


def test_text_of_another_tokenizer_is_refused(base, tmp_path):
    wrong = calibration(samples=2)
    wrong.token_ids[1, 3] = 100_000
    with pytest.raises(ModelError, match="holds token 100000"):
        derive_tiny(base, tmp_path / "sub", recovery=wrong)


def test_memory_and_disk_are_forecast(base, tmp_path, monkeypatch):
    said = {}
    for name, text in {"without": None, "with": TEXT}.items():
        derive_tiny(base, tmp_path / name, recovery=text, announce=lambda line, name=name: said.setdefault(name, line))
    needed = {name: float(line.split()[2]) for name, line in said.items()}
    assert needed["with"] > needed["without"]
    monkeypatch.setattr("secateur.pruning.forecast.available_memory", lambda: 2_000_000)
    derive_tiny(base, tmp_path / "fits")
    with pytest.raises(ResourceError, match="memory"):
        derive_tiny(base, tmp_path / "does not", recovery=TEXT)


def test_numbers_that_are_none_end_it(base, tmp_path, monkeypatch):
    real = recovery.distil

    def overflowing(model, *arguments, **options):
        real(model, *arguments, **options)
        next(model.get_decoder().layers[0].parameters()).grad[0] = math.inf

    monkeypatch.setattr(recovery, "distil", overflowing)
    with pytest.raises(ModelError, match="recovery failed at step 0"):
        derive_tiny(base, tmp_path / "sub", recovery=TEXT)


def test_rates_rise_and_fall():
    rates = [rate(step, 200) for step in range(200)]
    assert rates[:3] == [0.1, 0.2, 0.3]
    assert max(rates) == rates[9] == rates[10] == 1
    assert all(one > other for one, other in pairwise(rates[10:]))
    assert 0.05 <= rates[-1] < 0.051
    assert rate(0, 1) == 1


@pytest.mark.parametrize("tokens", [-1, 47])
def test_less_than_a_sequence_is_refused(tokens):
    from secateur.config import make_recipe

    with pytest.raises(ConfigError, match="recover"):
        make_recipe({"for": "python", "sequence_length": 48, "recover": tokens})
