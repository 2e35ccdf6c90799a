"""Recovery: gradients against autograd, what learns and what does not, and what is written down."""

import contextlib
import math
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import secateur  # noqa: F401 - registers the format
from secateur.checkpoint.bitmask import pack_integers, unpack
from secateur.checkpoint.format import CARD, MANIFEST, Encoding, read_json
from secateur.checkpoint.inspect import inspect
from secateur.checkpoint.quantise import dequantise, quantise
from secateur.config import make_recipe
from secateur.errors import ConfigError, CorpusError, ModelError, OutputError, ResourceError
from secateur.pruning import recovery
from secateur.pruning.derive import derive_recipe
from secateur.pruning.likely_tokens import with_tokens
from secateur.pruning.recovery import distil, rate
from tests.calibration.texts import write_data
from tests.pruning.test_base import tied_base
from tests.pruning.tiny_derivation import calibration, derive_tiny, masks_and_weights
from tests.pruning.tiny_recovery import TEXT, recovery_base, small_steps  # noqa: F401 - fixtures
from tests.tiny import save_tiny, tiny_model


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(model, parent, token_ids):
    """KL(parent || model) in nats at the mean position."""
    ours, theirs = (one(input_ids=token_ids).logits.double().log_softmax(-1) for one in (model, parent))
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()


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


@pytest.mark.parametrize("head", [1, 2])
def test_a_head_that_is_not_the_embedding(tmp_path, monkeypatch, head):
    """A model that ties the two and stores a head: the same one, or another, which transformers then unties."""
    base, seen = tied_base(tmp_path, head), []
    real = recovery.distil

    def noting(model, parent, token_ids, **options):
        seen.append([one(input_ids=token_ids).logits.detach() for one in (model, parent)])
        real(model, parent, token_ids, **options)

    monkeypatch.setattr(recovery, "distil", noting)
    derive_tiny(base, tmp_path / "sub", recovery=TEXT)
    wanted = AutoModelForCausalLM.from_pretrained(base)(input_ids=torch.from_numpy(TEXT.token_ids[:2])).logits
    assert torch.equal(seen[0][1], wanted)
    assert not torch.equal(seen[0][0], wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt_bigcode"])
def test_a_large_vocabulary_is_compared_where_it_is_likely(tmp_path, monkeypatch, family):
    """Heads of their own, tied ones, logits that are capped and that are scaled."""
    monkeypatch.setattr("secateur.pruning.likely_tokens.LIKELIEST", 40)
    monkeypatch.setattr(recovery, "SEEN", 3 * 48)
    monkeypatch.setattr(recovery, "LEARNING_RATE", 3e-3)
    base, seen = save_tiny(tmp_path / "base", family, dtype=torch.float32), []
    real = recovery.distil

    def noting(model, parent, token_ids, **options):
        seen.append([one(input_ids=token_ids).logits.detach() for one in (model, parent)])
        real(model, parent, token_ids, **options)

    monkeypatch.setattr(recovery, "distil", noting)
    parent, token_ids = opened(base), torch.from_numpy(TEXT.token_ids)
    derive_tiny(base, tmp_path / "pruned")
    derive_tiny(base, tmp_path / "learnt", recovery=TEXT)
    with torch.no_grad():
        wanted, some = parent(token_ids[:2]).logits, parent(token_ids[::4]).logits.flatten(0, 1)
    total = some.softmax(-1).mean(0) + torch.bincount(token_ids.flatten(), minlength=len(some[0])) / token_ids.numel()
    likely = total.topk(40).indices.sort().values
    assert all(one.shape[-1] == 40 for pair in seen for one in pair)
    torch.testing.assert_close(seen[0][1], wanted[..., likely], rtol=1e-4, atol=1e-5)
    before, after = (divergence(opened(tmp_path / one), parent, token_ids).item() for one in ("pruned", "learnt"))
    assert after < 0.98 * before
    stored, outer = opened(tmp_path / "learnt").state_dict(), {"embed_tokens", "lm_head", "wte", "embed_in"}
    ours = {name for name in stored if outer & set(name.split("."))}
    assert ours
    assert all(torch.equal(stored[name], parent.state_dict()[name]) for name in ours)


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_of_some_tokens(bias):
    """Its logits are those of the whole head, which is there again afterwards, even after an error."""
    model, token_ids = tiny_model("llama"), torch.from_numpy(TEXT.token_ids[:2])
    whole = model.lm_head = nn.Linear(64, 384, bias=bias)
    tokens, before = torch.tensor([3, 7, 300]), dict(whole.named_parameters())
    with torch.no_grad(), contextlib.suppress(KeyError), with_tokens(model, tokens):
        some = model(token_ids).logits
        raise KeyError
    torch.testing.assert_close(some, model(token_ids).logits[..., tokens])
    assert all(one is before[name] for name, one in model.lm_head.named_parameters())


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gemma2", "starcoder2", "opt"])
@pytest.mark.parametrize("values", ["base", "int8"])
def test_every_family_learns(tmp_path, monkeypatch, family, values):
    monkeypatch.setattr(recovery, "LEARNING_RATE", 3e-3)  # what changes more is too much for untrained biases
    base = save_tiny(tmp_path / "base", family)
    derive_tiny(base, tmp_path / "pruned", values=values)
    derive_tiny(base, tmp_path / "learnt", recovery=TEXT, values=values)
    parent, token_ids = opened(base), torch.from_numpy(TEXT.token_ids)
    before, after = (divergence(opened(tmp_path / one), parent, token_ids).item() for one in ("pruned", "learnt"))
    assert after < 0.95 * before


@pytest.mark.parametrize("values", ["base", "int4", "nl4"])
def test_embedding_and_head_are_those_that_are_stored(base, tmp_path, monkeypatch, values):
    """The last model that ran is the one that is stored, to the last bit, in what it puts out too."""
    seen = []
    monkeypatch.setattr(recovery, "recover", lambda pupil, *_: seen.append(pupil))
    monkeypatch.setattr("secateur.pruning.job.recover", recovery.recover)
    derive_tiny(base, tmp_path / "sub", recovery=TEXT, values=values)
    seen[0].round()
    token_ids = torch.from_numpy(TEXT.token_ids)
    ours, stored = (one(input_ids=token_ids).logits for one in (seen[0].model, opened(tmp_path / "sub")))
    torch.testing.assert_close(ours, stored, rtol=1e-5, atol=1e-5)


def test_parts_of_a_step_add_up(base, tmp_path, monkeypatch):
    derive_tiny(base, tmp_path / "together", recovery=TEXT)
    monkeypatch.setattr(recovery, "_LOGITS_BYTES", 1)
    calls, real = [], recovery.distil
    monkeypatch.setattr(recovery, "distil", lambda *given, **options: (calls.append(1), real(*given, **options)))
    derive_tiny(base, tmp_path / "apart", recovery=TEXT)
    assert len(calls) == len(TEXT.token_ids)
    one, other = masks_and_weights(tmp_path / "together"), masks_and_weights(tmp_path / "apart")
    for name in one:
        torch.testing.assert_close(one[name][1], other[name][1], rtol=0.05, atol=3e-3)


def test_text_longer_than_a_step(base, tmp_path):
    derive_tiny(base, tmp_path / "sub", recovery=calibration(samples=2, sequence_length=120, seed=9))
    assert read_json(tmp_path / "sub" / MANIFEST)["recipe"]["recover"] == 240


@pytest.mark.parametrize("values", ["int8", "int4", "nl4"])
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
    assert manifest["recipe"]["recover_for"] == []
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
    assert "norms and biases inside the blocks have learnt" in told[1]
    assert "norms are those of the parent" in others[1]


def test_text_of_another_tokenizer_is_refused(base, tmp_path):
    wrong = calibration(samples=2)
    wrong.token_ids[1, 3] = 100_000
    with pytest.raises(ModelError, match="the text for recovery holds token 100000"):
        derive_tiny(base, tmp_path / "sub", recovery=wrong)


def test_memory_and_disk_are_forecast(base, tmp_path, monkeypatch):
    said = {}
    for name, text in {"without": None, "with": TEXT}.items():
        derive_tiny(base, tmp_path / name, recovery=text, announce=lambda line, name=name: said.setdefault(name, line))
    memory, disk = ({name: float(line.split()[at]) for name, line in said.items()} for at in (2, -7))
    assert memory["with"] > memory["without"]
    assert disk["with"] > disk["without"]
    monkeypatch.setattr("secateur.pruning.forecast.available_memory", lambda: 2_000_000)
    derive_tiny(base, tmp_path / "fits")
    with pytest.raises(ResourceError, match=r"recovery holds the whole model.*leave out --recover"):
        derive_tiny(base, tmp_path / "does not", recovery=TEXT)


@pytest.mark.parametrize("values", ["base", "int4", "nl4"])
def test_numbers_that_are_none_end_it(base, tmp_path, monkeypatch, values):
    real = recovery.distil

    def overflowing(model, *arguments, **options):
        real(model, *arguments, **options)
        next(model.get_decoder().layers[0].parameters()).grad[0] = math.inf

    monkeypatch.setattr(recovery, "distil", overflowing)
    with pytest.raises(ModelError, match="recovery failed at step 0"):
        derive_tiny(base, tmp_path / "sub", recovery=TEXT, values=values)


def test_rates_rise_and_fall():
    rates = [rate(step, 200) for step in range(200)]
    assert rates[:3] == [0.1, 0.2, 0.3]
    assert max(rates) == rates[9] == rates[10] == 1
    assert all(one > other for one, other in pairwise(rates[10:]))
    assert 0.05 <= rates[-1] < 0.051
    assert rate(0, 1) == 1


def test_other_text_to_learn_from(base, tmp_path):
    for domain in ("python", "java"):
        write_data(tmp_path / "data", domain)
    recipe = {
        "model": str(base),
        "for": "python",
        "method": "wanda",
        "samples": 4,
        "sequence_length": 48,
        "recover": 96,
    }
    learnt = {}
    for name, others in (("same", ["python"]), ("java", ["java"]), ("both", ["java=0.5", "python=0.5"])):
        options = {"output": tmp_path / name, "data": tmp_path / "data", "threads": 1}
        derive_recipe(make_recipe({**recipe, "recover": 96, "recover_for": others}), **options)
        manifest = read_json(tmp_path / name / MANIFEST)
        assert manifest["recipe"]["recover_for"] == (others if name != "same" else [])
        assert ("of java" in inspect(tmp_path / name).describe()) == (name != "same")
        assert [one["domain"] for one in manifest["calibration"]["provenance"]] == ["python"]
        learnt[name] = [one["domain"] for one in manifest["recovery"]["provenance"]]
    assert learnt == {"same": ["python"], "java": ["java"], "both": ["java", "python"]}
    with pytest.raises(OutputError, match=r"made with another recipe \(recover_for\)"):
        derive_recipe(
            make_recipe({**recipe, "recover": 96, "recover_for": ["java=2", "python"]}), **options, resume=True
        )


@pytest.mark.parametrize(("content", "hint"), [("", False), ('{"text": "x = 1  # short, but text enough"}\n', True)])
def test_only_too_little_text_to_learn_from_asks_for_less(base, tmp_path, content, hint):
    write_data(tmp_path / "data", "python")
    text = tmp_path / "text.jsonl"
    text.write_text(content)
    recipe = {"model": str(base), "for": "python", "samples": 4, "sequence_length": 48}
    with pytest.raises(CorpusError) as raised:
        derive_recipe(
            make_recipe({**recipe, "recover": 9600, "recover_for": [str(text)]}),
            output=tmp_path / "sub",
            data=tmp_path / "data",
        )
    assert ("give it less" in str(raised.value)) == hint
    assert not (tmp_path / "sub").exists()


def test_the_manifest_of_text_from_elsewhere(base, tmp_path):
    other = replace(TEXT, mixture=(("java", 0.5), ("general", 0.5)))
    derive_tiny(base, tmp_path / "sub", recovery=other)
    assert read_json(tmp_path / "sub" / MANIFEST)["recipe"]["recover_for"] == ["java=0.5", "general=0.5"]


@pytest.mark.parametrize("tokens", [-1, 47])
def test_less_than_a_sequence_is_refused(base, tmp_path, tokens):
    with pytest.raises(ConfigError, match="recover"):
        derive_recipe(
            make_recipe({"model": str(base), "for": "python", "sequence_length": 48, "recover": tokens}),
            output=tmp_path / "out",
        )


@pytest.mark.parametrize("values", ["int8", "int4", "nl4"])
def test_what_is_learnt_is_what_is_stored_for_weights_of_zero_too(values):
    weight = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 70, generator=torch.Generator().manual_seed(1)) < 0.6
    weight[:, ::3] = 0
    weight[2] = 0
    scales = quantise(weight, mask, None, values=values, group_size=32).scales
    grid = recovery.Grid(scales, mask, Encoding(values, 32))
    stored = grid.quantised(weight * mask)
    assert torch.equal(dequantise(stored, values=values, group_size=32), grid.nearest(weight * mask))
    packed = pack_integers(stored, mask, Encoding(values, 32).bits)
    assert torch.equal(unpack(packed, (4, 70), encoding=Encoding(values, 32))[0], grid.nearest(weight * mask))


@pytest.mark.parametrize("factor", [0.125, 8.0])
def test_models_of_large_and_small_weights_learn_alike(base, tmp_path, factor):
    """Values made smaller and what reads them larger are the same model, and learn the same."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= factor
            layer.self_attn.o_proj.weight /= factor
            layer.mlp.up_proj.weight *= factor
            layer.mlp.down_proj.weight /= factor
    shutil.copytree(base, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    lost = {}
    for name, folder in {"one": base, "other": tmp_path / "other"}.items():
        derive_tiny(folder, tmp_path / f"{name}-sub", recovery=TEXT)
        lost[name] = divergence(opened(tmp_path / f"{name}-sub"), opened(folder), torch.from_numpy(TEXT.token_ids))
    torch.testing.assert_close(lost["one"], lost["other"], rtol=1e-3, atol=0)
