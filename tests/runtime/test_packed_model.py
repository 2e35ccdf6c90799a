"""Sub-models of any architecture, opened packed: what they compute, what they hold, what they refuse."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from secateur.checkpoint.export import export
from secateur.errors import CheckpointError, ModelError
from secateur.models.source import resolve_model
from secateur.runtime import kernels, loading, packed_model
from secateur.runtime.loading import load, open_model
from secateur.runtime.packed_matrix import PackedMatrix
from secateur.runtime.sparse_linear import PackedEmbedding, SparseLinear
from tests.calibration.texts import write_folder
from tests.pruning.tiny_derivation import derive_tiny
from tests.runtime.native_models import sub_model
from tests.tiny import OTHER_FAMILIES, save_tiny

FAMILIES = ["llama", "qwen2", "gemma2", "gemma3", *OTHER_FAMILIES]
IDS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that derives a sub-model of a family once."""
    root = tmp_path_factory.mktemp("packed")
    text = root / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 12)

    def make(family, values="int4"):
        base, output = root / family, root / f"{family}-{values}"
        if not base.exists():
            save_tiny(base, family)
        return output if output.exists() else sub_model(base, text, output, values=values)

    return make


def packed(folder):
    return open_model(resolve_model(str(folder)), packed=True)


def unpacked(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(ids).logits.float()


@pytest.mark.parametrize("values", ["base", "int8", "int4", "nl4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_the_unpacked_model_does(monkeypatch, made, family, values):
    folder = made(family, values)
    expected = logits(unpacked(folder))
    found = logits(packed(folder).to(torch.float32))
    # Activations in bf16 or 8 bits: of models this narrow, whose weights are random, the latter costs up to 1.5%.
    error = (found - expected).pow(2).mean().sqrt()
    assert error < (0.015 if values == "base" else 0.03) * expected.std()
    monkeypatch.setattr(kernels, "available", lambda: False)
    model = packed(folder)
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model.to(torch.float32)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])  # tied and untied heads
@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0, "values": "int4"}, {"trim_vocabulary": True, "values": "int8"}, {"trim_vocabulary": True}],
    ids=["nothing pruned", "trimmed integers", "trimmed floats"],
)
def test_what_has_no_bitmask_stays_packed_too(monkeypatch, tmp_path, family, options):
    base = save_tiny(tmp_path / "base", family)
    text = write_folder(tmp_path / "text", [f"{i}.py" for i in range(12)])
    folder = sub_model(base, text, tmp_path / "sub", **options)
    expected = logits(unpacked(folder))
    model = packed(folder)
    assert any(isinstance(module, PackedMatrix) for module in model.modules())
    assert (logits(model.to(torch.float32)) - expected).pow(2).mean().sqrt() < 0.06 * expected.std()
    monkeypatch.setattr(kernels, "available", lambda: False)
    torch.testing.assert_close(logits(packed(folder).to(torch.float32)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "gpt_bigcode", "opt"])
def test_generates_with_a_cache(monkeypatch, made, family):
    monkeypatch.setattr(loading, "_warn_without_kernels", lambda: None)
    monkeypatch.setattr(kernels, "available", lambda: False)  # exact, so that the tokens are the same
    folder = made(family)
    mine, other = packed(folder).to(torch.float32), unpacked(folder)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(mine.generate(IDS, **options), other.generate(IDS, **options))


def test_auto_runs_what_is_not_native(made):
    loaded = load(made("gemma3"))
    assert loaded.backend.name == "torch"
    assert any(isinstance(module, SparseLinear) for module in loaded.model.modules())
    assert loaded.generate("def f(x):", 8, ignore_eos=True)
    assert load(made("qwen2")).backend.name == "native"


@pytest.mark.parametrize("values", ["base", "int8", "int4", "nl4"])
def test_it_is_as_large_as_its_files_and_lies_in_them(made, values):
    folder = made("starcoder2", values)
    model = packed(folder)
    assert not [name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)]
    tensors = [*model.parameters(), *model.buffers()]
    bytes_held = sum({one.data_ptr(): one.nbytes for one in tensors}.values())
    assert bytes_held < 1.02 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    matrices = [module for module in model.modules() if isinstance(module, PackedMatrix)]
    mapped = {region.path for region in psutil.Process().memory_maps()}
    assert mapped >= {str(file) for file in sorted(folder.glob("*.safetensors"))[:-1]}
    names = json.loads((folder / "config.json").read_text())["quantization_config"]["shapes"]
    assert {one.name for one in matrices} >= set(names)


@pytest.mark.parametrize("native", [True, False])
def test_no_more_than_a_layer_is_ever_unpacked(monkeypatch, made, native):
    if not native:
        monkeypatch.setattr(kernels, "available", lambda: False)
    model = packed(made("gemma3"))
    unpack, alive, largest = PackedMatrix._unpack_rows, [], 0

    def watched(self, block, dtype):
        nonlocal largest
        rows = unpack(self, block, dtype)
        alive.append(rows.untyped_storage()._weak_ref())
        held = [one for one in alive if not torch.UntypedStorage._expired(one)]
        largest = max(largest, len(held))
        return rows

    monkeypatch.setattr(PackedMatrix, "_unpack_rows", watched)
    logits(model)
    assert len(alive) == (0 if native else 3 * 7 + 1)
    assert largest == (0 if native else 1)


def test_embedding_and_tied_head_are_one(made):
    model = packed(made("starcoder2"))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, SparseLinear)
    assert embedding.packed is head.packed
    apart = packed(made("phi3"))
    assert apart.get_input_embeddings().packed is not apart.get_output_embeddings().packed


def test_a_head_stored_beside_the_embedding_that_it_is_tied_to_is_used(made, tmp_path):
    folder = shutil.copytree(made("phi3"), tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = packed(folder)
    assert model.get_input_embeddings().packed is not model.get_output_embeddings().packed
    assert torch.equal(logits(model), logits(packed(made("phi3"))))


def test_what_no_packed_module_can_replace_is_unpacked(made, monkeypatch, caplog):
    folder = made("starcoder2")
    has_module = packed_model._has_module
    monkeypatch.setattr(
        packed_model, "_has_module", lambda model, name, **dense: "mlp" in name and has_module(model, name, **dense)
    )
    with caplog.at_level(logging.INFO, "secateur"):
        model = packed(folder).to(torch.float32)
    assert "13 weights are unpacked: no packed module takes the place of" in caplog.text
    block = model.model.layers[0]
    assert type(block.self_attn.q_proj) is nn.Linear
    assert type(block.mlp.c_fc) is SparseLinear
    expected = logits(unpacked(folder))
    assert (logits(model) - expected).pow(2).mean().sqrt() < 0.03 * expected.std()


def test_it_is_for_inference_only(made, tmp_path):
    model = packed(made("qwen2"))
    assert logits(model).isfinite().all()
    assert not model(IDS).logits.requires_grad
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert not model.hf_quantizer.is_trainable
    model.requires_grad_(True)
    with pytest.raises(ModelError, match="has no gradient"):
        model(IDS)


def test_a_step_of_few_tokens_lends_torchs_threads_to_the_kernels(monkeypatch, made):
    model, before, seen = packed(made("gemma3")), torch.get_num_threads(), []
    multiply = kernels.matmul

    def watched(weight, x, pool):
        seen.append((torch.get_num_threads(), pool.threads))
        return multiply(weight, x, pool)

    monkeypatch.setattr(kernels, "matmul", watched)
    try:
        torch.set_num_threads(2)
        for ids, torch_threads in ((IDS[:, :2], 1), (IDS, 2)):
            seen.clear()
            logits(model, ids)
            assert set(seen) == {(torch_threads, 2)}
            assert torch.get_num_threads() == 2
        with pytest.raises(IndexError):
            model(torch.tensor([[9999]]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_idle_threads_sleep_where_nobody_has_said_otherwise(made):
    code = (
        "import os, sys, secateur; from secateur.runtime.loading import load;"
        "load(sys.argv[1], engine='torch'); print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    folder = made("llama")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for path, own, expected in (
        (folder, {}, "passive"),
        (folder, {"OMP_WAIT_POLICY": "active"}, "active"),
        (folder.parent / "llama", {}, "None"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            capture_output=True,
            text=True,
            check=True,
            env={**environment, **own},
        )
        assert done.stdout.split()[-1] == expected


def test_evaluation_and_transformers_get_an_ordinary_model(made):
    for model in (open_model(resolve_model(str(made("qwen2")))), AutoModelForCausalLM.from_pretrained(made("qwen2"))):
        assert not any(isinstance(module, PackedMatrix) for module in model.modules())


def test_no_warning_tells_of_weights_that_stay_packed(made, capfd):
    packed(made("qwen2"))
    error = capfd.readouterr().err
    assert "UNEXPECTED" not in error
    assert "MISSING" not in error


def changed(folder, target, old, new):
    shutil.copytree(folder, target)
    shard = target / "model-00002-of-00004.safetensors"
    content = shard.read_bytes()
    assert old in content
    shard.write_bytes(content.replace(old, new))
    return target


def test_missing_and_damaged_parts_are_named(made, tmp_path):
    folder = made("starcoder2")
    name = "model.layers.1.mlp.c_fc.weight"
    for suffix, other, message in (
        (b"scales", b"scalez", "it has the parts bitmask, row_offsets, values, expected"),
        (b"values", b"valuez", f"lacks '{name}.values'"),
    ):
        key = f"{name}.".encode()
        target = changed(folder, tmp_path / suffix.decode(), key + suffix, key + other)
        with pytest.raises(CheckpointError, match=message):
            packed(target)
    target = shutil.copytree(folder, tmp_path / "shapes")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["shapes"][name] = [160, 128]
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[160, 128\] in quantization_config"):
        packed(target)
    shard = target / "model-00002-of-00004.safetensors"
    shutil.copyfile(folder / "config.json", target / "config.json")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises((CheckpointError, ModelError)):
        packed(target)


@pytest.mark.parametrize("kind", ["pruned", "dense"])
def test_a_weight_that_is_there_twice_is_refused_by_every_reader(made, tmp_path, kind):
    """Which of the two is used must not depend on who reads."""
    target = shutil.copytree(made("qwen2"), tmp_path / "twice")
    name = "model.embed_tokens.weight" if kind == "dense" else "model.layers.1.mlp.up_proj.weight"
    shard = next(path for path in target.glob("*.safetensors") if f"{name}.values" in load_file(path))
    tensors = load_file(shard)
    shape = json.loads((target / "config.json").read_text())["quantization_config"]
    shape = {**shape["shapes"], **shape.get("dense", {}).get("shapes", {})}[name]
    save_file({**tensors, name: torch.full(shape, 9.0, dtype=torch.bfloat16)}, shard, {"format": "pt"})
    for reader in (
        packed,
        lambda path: load(path, engine="native"),
        AutoModelForCausalLM.from_pretrained,
        lambda path: export(path, output=tmp_path / "dense"),
        lambda path: export(path, output=tmp_path / "x.gguf", format="gguf"),
    ):
        with pytest.raises(CheckpointError, match=f"'{re.escape(name)}' is stored twice"):
            reader(target)


def test_ties_may_be_asked_for_again(made):
    model = packed(made("qwen2"))
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)


def test_a_thread_born_while_another_decodes_has_its_own_threads(made, monkeypatch):
    """torch gives a new thread the number that was set last, which is 1 in the middle of a step."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        model = packed(made("gemma3"))
        seen = []

        def other():
            logits(model, IDS[:1, :4])
            seen.append(torch.get_num_threads())

        def in_the_middle(*_):
            assert torch.get_num_threads() == 1
            thread = threading.Thread(target=other)
            handle.remove()
            thread.start()
            thread.join()

        handle = model.model.layers[0].register_forward_pre_hook(in_the_middle)
        logits(model, IDS[:1, :4])
        assert seen == [2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("why", ["fp32", "no native code"])
def test_on_the_cpu_nothing_stays_packed_that_no_kernel_multiplies(tmp_path, monkeypatch, why):
    base = save_tiny(tmp_path / "base", "gemma3", **({"dtype": torch.float32} if why == "fp32" else {}))
    derive_tiny(base, tmp_path / "sub")
    if why != "fp32":
        monkeypatch.setattr(kernels, "available", lambda: False)
    model = load(tmp_path / "sub").model
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert torch.isfinite(logits(model)).all()
