"""Which models load natively, which go to torch, and what a damaged one says."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from secateur.errors import CheckpointError, ConfigError, ModelError
from secateur.runtime.architecture import NotNativeError
from secateur.runtime.loading import load
from secateur.runtime.mapped import MappedFile
from tests.runtime.native_models import changed_weights, native
from tests.tiny import BOS, EOS, save_tiny


def test_other_precisions_go_to_torch(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama", dtype=torch.float32)
    with pytest.raises(NotNativeError, match="stored as F32"):
        load(folder, engine="native")
    assert load(folder).backend.name == "torch"


def test_engine_options(folders):
    with pytest.raises(ConfigError, match="engine is 'fast'"):
        load(folders["llama"], engine="fast")
    with pytest.raises(ConfigError, match="runs on the CPU, not on device 'meta'"):
        load(folders["llama"], engine="native", device="meta")
    for threads in (0, 100_000):
        with pytest.raises(ConfigError, match=f"threads is {threads}"):
            load(folders["llama"], engine="native", threads=threads)
    with pytest.raises(ModelError, match="runs natively, without transformers"):
        _ = load(folders["llama"], engine="native").model


def test_damaged_files(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "cut")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match="does not fit into it"):
        MappedFile(weights)
    weights.write_bytes(content.replace(b"model.layers.1.mlp.up_proj.weight", b"model.layers.1.mlp.xx_proj.weight"))
    with pytest.raises(NotNativeError, match=r"hold no 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        native(folder)
    values = bytearray(content)
    values[-2:] = b"\x80\x7f"  # an infinity
    weights.write_bytes(values)
    with pytest.raises(CheckpointError):
        native(folder)


def test_neither_torch_nor_transformers_is_imported(folders):
    code = (
        "import sys, secateur\n"
        f"print(len(secateur.load({str(folders['llama'])!r}, engine='native').generate('x', 3, ignore_eos=True)))\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "model.layers.1.self_attn.q_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
        ("llama", "lm_head.weight"),
    ],
)
def test_weights_that_the_config_asks_for_have_to_be_there(folders, tmp_path, family, name):
    folder = changed_weights(folders[family], tmp_path / "less", lambda tensors: tensors.pop(name))
    with pytest.raises(NotNativeError, match=f"hold no '{name}'"):
        load(folder, engine="native")
    with pytest.raises(CheckpointError, match=f"missing from its files: {name}"):
        load(folder)


def test_names_that_only_transformers_knows_go_to_torch(folders, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    folder = changed_weights(folders["qwen2"], tmp_path / "bare", rename)
    assert load(folder).backend.name == "torch"


def test_end_tokens_are_those_of_transformers(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "specials")
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        kept = {key: value for key, value in content.items() if not key.startswith(("eos_token", "bos_token"))}
        (folder / name).write_text(json.dumps(kept))
    with pytest.raises(NotNativeError, match="which token ends a text"):
        native(folder)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<eos>", "bos_token": {"content": "<bos>"}})
    )
    backend = native(folder)
    assert (backend.end_ids, backend.codec.begin_id) == (frozenset({EOS}), BOS)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": {"a": 1}}))
    with pytest.raises(ModelError, match="expected numbers"):
        native(folder)


def test_a_wrong_instruction_set_is_called_that(folders):
    code = f"import secateur; secateur.load({str(folders['llama'])!r}, engine='native')"
    environment = {**os.environ, "SECATEUR_ISA": "abacus"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "SECATEUR_ISA is 'abacus'" in done.stderr
