"""Models whose files were damaged at random: the engine refuses them or computes something, and never crashes.

The same under sanitizers is in tests/native/test_sanitized.py, and 1,000 times in `make corruptions`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.errors import CheckpointError, ModelError, SecateurError
from secateur.runtime.loading import load
from secateur.runtime.mapped import MappedFile
from tests.runtime.damage import dump, read_shard, write_shard
from tests.runtime.native_models import NATIVE
from tests.runtime.sanitized import VALUES, make_models

CASES = 100


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    make_models(root, NATIVE)
    return root


@pytest.mark.parametrize("values", VALUES)
def test_corrupted_files_are_refused_or_harmless(models, values):
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.corruptions", str(models / values), "--count", str(CASES)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    counts = json.loads(done.stdout)
    assert counts["refused"] > CASES / 3
    assert counts["ran"] > CASES / 10


@pytest.fixture
def folder(models, tmp_path):
    return shutil.copytree(models / "int8" / "qwen2", tmp_path / "model")


def refuse(folder, match):
    with pytest.raises(SecateurError, match=match):
        load(folder, engine="native").generate("x", 2, ignore_eos=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": 1e300}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2e-38, "rope_theta": 2e-38}}, "infinite frequencies"),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": 5}, "layer_types 5"),
        ({"eos_token_id": "<digits>"}, "not JSON"),
        ({"eos_token_id": "<depth 980>"}, "JSON|eos_token_id"),
    ],
    ids=["epsilon", "theta", "factor", "layer types", "digits", "depth"],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_values_of_the_config_that_cannot_be(folder, changes, match):
    file = folder / "config.json"
    file.write_text(dump({**json.loads(file.read_text()), **changes}))
    refuse(folder, match)


def test_numbers_that_python_does_not_read(folder):
    (folder / "generation_config.json").write_text(dump({"eos_token_id": "<digits>"}))
    refuse(folder, "is not JSON")


def test_half_a_surrogate_is_no_token(folder):
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "\ud800"}))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": None}))
    assert load(folder, engine="native").backend.codec.begin_id is None


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200, "\ud800", "a\x00b"])
def test_names_that_no_file_can_have(folder, name):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = name
    file.write_text(json.dumps(index))
    refuse(folder, "lacks")


@pytest.mark.parametrize("end", ["<infinity>", "<4000 digits>", 1.5, -1, True])
def test_ends_of_tensors_that_are_no_places(folder, end):
    file = sorted(folder.glob("*.safetensors"))[0]
    header, data = read_shard(file)
    next(entry for name, entry in header.items() if name != "__metadata__")["data_offsets"][1] = end
    write_shard(file, dump(header), data)
    with pytest.raises(ModelError, match="puts a tensor nowhere"):
        load(folder, engine="native")


def test_a_shape_of_very_many_huge_numbers_is_refused_at_once(tmp_path):
    entry = {"dtype": "U8", "shape": [10**100] * 50_000, "data_offsets": [0, 0]}
    write_shard(tmp_path / "x.safetensors", json.dumps({"x": entry}), b"")
    with pytest.raises(CheckpointError, match="does not fit into it"):
        MappedFile(tmp_path / "x.safetensors")
