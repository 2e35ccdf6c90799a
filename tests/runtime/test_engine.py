"""The native engine against transformers in float32, on tiny models of each family that it runs."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secateur.config import make_recipe
from secateur.errors import CheckpointError, ConfigError, ModelError
from secateur.models.source import resolve_model
from secateur.pruning.derive import derive_recipe
from secateur.runtime.architecture import NotNativeError, read_architecture
from secateur.runtime.engine import open_native
from secateur.runtime.loading import LoadedModel, load
from secateur.runtime.mapped import MappedFile
from secateur.runtime.native_model import NativeSequence
from secateur.runtime.options import GenerationOptions
from tests.tiny import BOS, EOS, save_tiny

NATIVE = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS = {
    **{family: (family, {}) for family in NATIVE},
    "llama3 scaling": ("llama", {"rope_parameters": LLAMA3}),
    "linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "large epsilon": ("llama", {"rms_norm_eps": 0.1}),
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one head for each": ("llama", {"num_key_value_heads": 4}),
    "one head for all": ("qwen2", {"num_attention_heads": 12, "num_key_value_heads": 1, "hidden_size": 192}),
    "wide heads": ("qwen3", {"head_dim": 48}),
}


def reference_logits(folder: Path, token_ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].numpy()


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Keys and values in half precision and bf16 activations leave about three digits."""
    return bool(np.abs(found - expected).max() < 0.02 * np.abs(expected).max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("native")
    return {
        name: save_tiny(root / name.replace(" ", "-"), family, **changes)
        for name, (family, changes) in VARIANTS.items()
    }


def native(folder: Path, threads: int = 2):
    return open_native(resolve_model(str(folder)), threads=threads)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(folders, variant):
    model = native(folders[variant]).model
    token_ids = tokens(90)  # beyond the sliding window of mistral, and several blocks of the cache
    expected = reference_logits(folders[variant], token_ids)
    sequence = NativeSequence(model, 100)
    found = model.forward(token_ids[:70], [sequence] * 70, [True] * 70)
    for token_id in token_ids[70:]:
        found = np.concatenate([found, model.forward([token_id], [sequence], [True])])
    assert close(found, expected)
    assert len(sequence) == 90


def test_long_prompts_go_in_parts(folders, tmp_path):
    folder = save_tiny(tmp_path / "long", "llama", max_position_embeddings=700)
    model = native(folder).model
    token_ids = tokens(600)  # more than are computed together
    sequence = NativeSequence(model, 600)
    found = model.forward(token_ids, [sequence] * 600, [i % 7 == 0 for i in range(600)])
    assert close(found, reference_logits(folder, token_ids)[::7])


def test_sequences_of_a_batch_are_independent(folders):
    model = native(folders["qwen2"]).model
    prompts = [tokens(length, seed) for seed, length in enumerate((5, 20, 33))]
    sequences = [NativeSequence(model, 64) for _ in prompts]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        model.forward(prompt, [sequence] * len(prompt), [False] * len(prompt))
    more = [tokens(6, 10 + i) for i in range(3)]
    for step in range(6):
        found = model.forward([one[step] for one in more], sequences, [True, False, True])
    for row, index in enumerate((0, 2)):
        assert close(found[row], reference_logits(folders["qwen2"], prompts[index] + more[index])[-1])


def test_truncated_sequence_goes_on_as_if_nothing_had_followed(folders):
    model = native(folders["mistral"]).model
    sequence = NativeSequence(model, 100)
    start, wrong, right = tokens(40), tokens(30, 1), tokens(30, 2)
    model.forward(start + wrong, [sequence] * 70, [False] * 70)
    sequence.truncate(40)
    found = model.forward(right, [sequence] * 30, [True] * 30)
    assert close(found, reference_logits(folders["mistral"], start + right)[40:])


def test_steps_that_cannot_be_change_nothing(folders):
    model = native(folders["llama"]).model
    sequence = NativeSequence(model, 10)
    model.forward([1, 2, 3], [sequence] * 3, [False] * 3)
    for bad in (-1, 384):
        with pytest.raises(ConfigError, match="outside of the vocabulary of 384"):
            model.forward([1, bad], [sequence] * 2, [False, True])
    with pytest.raises(ConfigError, match="no room for 8 more tokens"):
        model.forward([1] * 8, [sequence] * 8, [False] * 8)
    assert len(sequence) == 3
    with pytest.raises(ValueError, match="cannot be cut"):
        sequence.truncate(4)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_result(folders, threads):
    token_ids = tokens(50)
    found = []
    for count in (2, threads):
        model = native(folders["qwen3"], count).model
        found.append(model.forward(token_ids, [NativeSequence(model, 50)] * 50, [True] * 50))
    assert np.array_equal(*found)


@pytest.mark.parametrize("family", NATIVE)
def test_generates_what_torch_does(folders, family):
    loaded = {engine: load(folders[family], engine=engine) for engine in ("native", "torch", "auto")}
    assert {name: one.backend.name for name, one in loaded.items()} == {
        "native": "native",
        "torch": "torch",
        "auto": "native",
    }
    prompt = loaded["native"].tokenizer.encode("def f(x):").ids
    assert prompt == loaded["torch"].tokenizer("def f(x):")["input_ids"]
    found = list(loaded["native"].backend.generate(prompt, GenerationOptions(max_new_tokens=12, ignore_eos=True)))
    logits = reference_logits(folders[family], prompt + found)[len(prompt) - 1 : -1]
    chosen = logits[range(12), found]
    assert (chosen > logits.max(axis=1) - 0.02 * np.abs(logits).max()).all()  # the best, or as good as it
    assert (chosen == logits.max(axis=1)).sum() >= 9


@pytest.fixture(scope="module")
def source_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 12)
    return folder


def sub_model(base: Path, text: Path, output: Path, **options) -> Path:
    recipe = make_recipe({"model": str(base), "for": str(text), "samples": 4, "sequence_length": 32, **options})
    derive_recipe(recipe, output=output)
    return output


@pytest.mark.parametrize("values", ["base", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sub_model_runs_packed(folders, source_text, tmp_path, family, values):
    folder = sub_model(folders[family], source_text, tmp_path / "sub", values=values)
    model = native(folder).model
    token_ids = tokens(40)
    found = model.forward(token_ids, [NativeSequence(model, 40)] * 40, [True] * 40)
    expected = reference_logits(folder, token_ids)
    # Integer weights take activations as signed bytes, which costs a percent or two of what logits differ by.
    assert close(found, expected) if values == "base" else (found - expected).std() < 0.04 * expected.std()


def test_prefix_is_not_computed_again(folders, monkeypatch):
    backend = native(folders["llama"])
    loaded = LoadedModel(folders["llama"], backend)
    computed = []
    forward = backend.model.forward

    def counting(ids, sequences, wants):
        computed.append(len(ids))
        return forward(ids, sequences, wants)

    monkeypatch.setattr(backend.model, "forward", counting)
    first = loaded.generate("a" * 50, 4, ignore_eos=True)
    assert sum(computed) == 50 + 3
    for prompt, needed in (("a" * 50 + "b" * 5, 5), ("a" * 50 + "b" * 5, 1), ("a" * 20, 1), ("b", 1)):
        computed.clear()
        again = loaded.generate(prompt, 4, ignore_eos=True)
        assert sum(computed) <= needed + 3
        assert again == LoadedModel(folders["llama"], native(folders["llama"])).generate(prompt, 4, ignore_eos=True)
    assert loaded.generate("a" * 50, 4, ignore_eos=True) == first


def test_two_streams_at_once_do_not_mix(folders):
    loaded = load(folders["llama"], engine="native")
    prompts = ("def f(x):", "class A:")
    alone = [loaded.generate(prompt, 20, ignore_eos=True) for prompt in prompts]
    streams = [loaded.stream(prompt, 20, ignore_eos=True) for prompt in prompts]
    texts = ["", ""]
    for pieces in zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone


def test_a_closed_stream_leaves_the_model_usable(folders):
    loaded = load(folders["llama"], engine="native")
    stream = loaded.stream("def f(x):", 20, ignore_eos=True)
    next(stream)
    stream.close()
    fresh = load(folders["llama"], engine="native")
    assert loaded.generate("def g", 10, ignore_eos=True) == fresh.generate("def g", 10, ignore_eos=True)


def test_end_of_sequence_ends_the_text(folders):
    backend = native(folders["llama"])
    endless = list(backend.generate([1, 2, 3], GenerationOptions(max_new_tokens=30, ignore_eos=True)))
    assert len(endless) == 30
    backend.end_ids = frozenset({endless[10]})
    first = endless.index(endless[10])
    assert list(backend.generate([1, 2, 3], GenerationOptions(max_new_tokens=30))) == endless[:first]
    assert EOS in native(folders["llama"]).end_ids


def test_seed_repeats_a_draw(folders):
    backend = native(folders["llama"])

    def draw(seed):
        options = GenerationOptions(max_new_tokens=20, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True)
        return list(backend.generate([1, 2, 3], options))

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "models of type 'gpt2' are not run natively"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"head_dim": 20}, "heads of 20 entries"),
        ({"partial_rotary_factor": 0.5}, "partial rotary embedding"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary scaling 'yarn'"),
        ({"num_experts": 4}, "mixtures of experts"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(folders, changes, message):
    config = json.loads((folders["llama"] / "config.json").read_text())
    with pytest.raises(NotNativeError, match=message):
        read_architecture({**config, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -1},
        {"num_hidden_layers": "3"},
        {"rms_norm_eps": -1},
        {"vocab_size": 0},
        {"rope_parameters": 5},
    ],
)
def test_sizes_that_cannot_be(folders, changes):
    config = json.loads((folders["llama"] / "config.json").read_text())
    with pytest.raises(ModelError, match=r"config\.json has "):
        read_architecture({**config, **changes})


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


def test_a_forked_process_goes_on(folders):
    backend = native(folders["llama"])
    options = GenerationOptions(max_new_tokens=8, ignore_eos=True)
    expected = list(backend.generate([1, 2, 3], options))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(list(backend.generate([1, 2, 3], options))).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert json.loads(pipe.read()) == expected
    os.waitpid(child, 0)


def changed_weights(folder: Path, target: Path, change, **config) -> Path:
    """Copy a model with other tensors, and other entries in its config."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**content, **config}))
    return target


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


def test_weights_that_the_config_does_not_ask_for_change_nothing(folders, tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.full((64,), 9.0, dtype=torch.bfloat16)
        tensors["counter"] = torch.ones(3, dtype=torch.bool)  # of a type that the engine does not read

    folder = changed_weights(folders["llama"], tmp_path / "more", add)
    texts = [load(one, engine="native").generate("x", 10, ignore_eos=True) for one in (folders["llama"], folder)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {key: LLAMA3[key] for key in LLAMA3 if not key.startswith("original")}},
    ],
)
def test_rotary_parameters_are_read_as_transformers_reads_them(folders, tmp_path, changes):
    folder = changed_weights(folders["llama"], tmp_path / "rope", lambda _: None, **changes)
    model = native(folder).model
    token_ids = tokens(60)
    found = model.forward(token_ids, [NativeSequence(model, 60)] * 60, [True] * 60)
    assert close(found, reference_logits(folder, token_ids))


def test_what_a_config_leaves_out_is_not_guessed(folders):
    config = json.loads((folders["mistral"] / "config.json").read_text())
    for key in ("max_position_embeddings", "num_key_value_heads", "head_dim"):
        with pytest.raises(NotNativeError, match=f"does not say {key}"):
            read_architecture({name: value for name, value in config.items() if name != key})
    without = {key: value for key, value in config.items() if key not in {"sliding_window", "layer_types"}}
    assert read_architecture(without).sliding_window == 4096  # the family's default
    assert read_architecture({**without, "sliding_window": None}).sliding_window == 0


def test_names_that_only_transformers_knows_go_to_torch(folders, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    folder = changed_weights(folders["qwen2"], tmp_path / "bare", rename)
    assert load(folder).backend.name == "torch"


def test_a_stream_closed_by_the_garbage_collector_does_not_block(folders, monkeypatch):
    backend = native(folders["llama"])
    options = GenerationOptions(max_new_tokens=5, ignore_eos=True)
    given_up = backend.generate([1, 2, 3], options)
    next(given_up)
    cycle = [given_up]
    cycle.append(cycle)
    del given_up, cycle
    forward = backend.model.forward

    def collecting(*arguments):
        gc.collect()
        return forward(*arguments)

    monkeypatch.setattr(backend.model, "forward", collecting)
    found = []
    thread = threading.Thread(target=lambda: found.extend(backend.generate([4, 5], options)), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert len(found) == 5


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
