"""A GGUF converts to a model that computes the same, once, and never by halves."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from secateur.errors import ModelError
from secateur.models import gguf as converter
from secateur.models.gguf import cached_conversion, convert_gguf, is_tied
from secateur.models.gguf_file import GGUFFile
from tests.models.gguf_files import write_gguf
from tests.tiny import tiny_model

Q8_0 = GGMLQuantizationType.Q8_0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: torch.nn.Module) -> torch.Tensor:
    # Longer than the sliding window of 32.
    ids = torch.randint(0, 384, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def load(folder: Path) -> torch.nn.Module:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_computes_what_the_original_computes(family: str, tmp_path: Path) -> None:
    original = tiny_model(family, dtype=torch.bfloat16).float()
    converted = load(convert_gguf(write_gguf(tmp_path / "m.gguf", original)))
    assert converted.config.model_type == original.config.model_type
    for name, tensor in original.state_dict().items():
        # Weights that are bf16 already come back bit for bit.
        torch.testing.assert_close(converted.state_dict()[name], tensor, atol=0, rtol=0, msg=name)
    torch.testing.assert_close(logits(converted), logits(original), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_config_says_what_the_original_says(family: str, tmp_path: Path) -> None:
    original = tiny_model(family).config
    converted = load(convert_gguf(write_gguf(tmp_path / "m.gguf", tiny_model(family)))).config
    for field in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "layer_types"),
        *("tie_word_embeddings", "sliding_window", "hidden_act", "hidden_activation", "attention_bias", "mlp_bias"),
        *("query_pre_attn_scalar", "final_logit_softcapping"),
    ):
        assert getattr(converted, field, None) == getattr(original, field, None), field
    assert json.loads((cached(tmp_path / "m.gguf") / "config.json").read_text())["dtype"] == "bfloat16"


def cached(path: Path) -> Path:
    return cached_conversion(path.stem, converter.sha256_file(path))


def test_biases_of_a_llama_are_reordered_too(tmp_path: Path) -> None:
    original = tiny_model("llama", attention_bias=True, mlp_bias=True)
    converted = load(convert_gguf(write_gguf(tmp_path / "m.gguf", original)))
    torch.testing.assert_close(logits(converted), logits(original), atol=0.15, rtol=0.05)
    name = "model.layers.1.self_attn.k_proj.bias"
    torch.testing.assert_close(converted.state_dict()[name], original.state_dict()[name], atol=0.01, rtol=0.01)


def test_quantised_tensors_are_dequantised_by_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.models import gguf_file

    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", 64 * 7)  # seven rows, which divides nothing
    original = tiny_model("llama")
    kinds = {f"blk.{i}.{name}.weight": Q8_0 for i in range(3) for name in ("attn_q", "attn_k", "ffn_down", "ffn_up")}
    kinds |= {"token_embd.weight": GGMLQuantizationType.Q5_0, "blk.0.attn_v.weight": GGMLQuantizationType.BF16}
    kinds |= {"blk.1.attn_v.weight": GGMLQuantizationType.F16}
    converted = load(convert_gguf(write_gguf(tmp_path / "m.gguf", original, kinds=kinds)))
    for name, weight in original.state_dict().items():
        got = converted.state_dict()[name]
        assert (got - weight).norm() <= (0.08 if "embed" in name else 0.02) * weight.norm(), name


def test_a_head_that_repeats_the_embedding_is_tied_from_the_more_precise_copy(tmp_path: Path) -> None:
    original = tiny_model("qwen2")
    matrix = original.model.embed_tokens.weight
    kinds = {"token_embd.weight": GGMLQuantizationType.Q5_0, "output.weight": Q8_0}
    path = write_gguf(tmp_path / "m.gguf", original, head=matrix, kinds=kinds)
    folder = convert_gguf(path)
    converted = load(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert converted.lm_head.weight.data_ptr() == converted.model.embed_tokens.weight.data_ptr()
    file = GGUFFile(path)
    stored = file.bfloat16(file.tensors["output.weight"]).float()
    assert torch.equal(converted.model.embed_tokens.weight, stored)


def test_a_head_of_its_own_stays_untied(tmp_path: Path) -> None:
    original = tiny_model("qwen2", tie_word_embeddings=False)
    path = write_gguf(tmp_path / "m.gguf", original)
    file = GGUFFile(path)
    assert not is_tied(file, file.tensors["token_embd.weight"], file.tensors["output.weight"])
    converted = load(convert_gguf(path))
    assert not converted.config.tie_word_embeddings
    torch.testing.assert_close(logits(converted), logits(original), atol=0.15, rtol=0.05)


def test_generation_stops_at_every_end_the_vocabulary_marks(tmp_path: Path) -> None:
    folder = convert_gguf(write_gguf(tmp_path / "m.gguf", tiny_model("llama")))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [258, 256]


def test_conversion_happens_once_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    first = convert_gguf(path)
    contents = {file.name: file.read_bytes() for file in first.iterdir()}
    other = convert_gguf(path, "another-name")
    assert {file.name: file.read_bytes() for file in other.iterdir()} == contents
    monkeypatch.setattr(converter, "_write_weights", lambda *_: pytest.fail("converted again"))
    assert convert_gguf(path) == first


def test_an_interrupted_conversion_leaves_nothing_that_is_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(converter, "build_generation_config", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_gguf(path)
    assert not (cache / "models").exists()
    # A kill leaves the partial folder: it is neither used nor in the way, and goes after a day.
    stale = cached(path).with_name(cached(path).name + ".partial-1-x")
    stale.mkdir(parents=True)
    folder = convert_gguf(path)
    assert stale.is_dir() and (folder / "model.safetensors").is_file()
    converter.shutil.rmtree(folder)
    os.utime(stale, (time.time() - 2e5,) * 2)
    convert_gguf(path)
    assert not stale.exists()


def test_a_faster_process_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    build = converter.build_generation_config

    def while_another_finishes(file: GGUFFile) -> dict[str, object]:
        cached(path).mkdir(parents=True)
        (cached(path) / "theirs").touch()
        return build(file)

    monkeypatch.setattr(converter, "build_generation_config", while_another_finishes)
    folder = convert_gguf(path)
    assert [file.name for file in folder.iterdir()] == ["theirs"]
    assert len(list(folder.parent.iterdir())) == 1


def _write(tmp_path: Path, **changes: object) -> Path:
    family = changes.pop("family", "llama")
    return write_gguf(tmp_path / "m.gguf", tiny_model(str(family)), **changes)  # type: ignore[arg-type]


BROKEN = {
    "missing tensor": ({"without": ("blk.1.ffn_up.weight",)}, "blk.1.ffn_up.weight"),
    "no embedding": ({"without": ("token_embd.weight",)}, "token_embd.weight"),
    "no vocabulary": ({"without": ("tokenizer",)}, "vocabulary"),
    "wrong shape": (
        {"without": ("output_norm.weight",), "tensors": {"output_norm.weight": np.zeros(32, np.float32)}},
        "shape [32] where its metadata say [64]",
    ),
    "unknown tensor": ({"tensors": {"blk.0.ssm.weight": np.zeros(32, np.float32)}}, "blk.0.ssm.weight"),
    "experts": ({"keys": {"llama.expert_count": 8}}, "mixture of experts"),
    "unknown scaling": ({"keys": {"llama.rope.scaling.type": "longrope"}}, "longrope"),
    "unknown factors": ({"tensors": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "rotary factors"),
    "split": ({"keys": {"split.count": 3}}, "split GGUF"),
    "unknown splitter": ({"pre": "some-new-one"}, "'some-new-one'"),
    "window": ({"family": "qwen2", "keys": {"qwen2.attention.sliding_window": 64}}, "sliding window"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_understood_is_refused_by_name(case: str, tmp_path: Path, cache: Path) -> None:
    changes, expected = BROKEN[case]
    path = _write(tmp_path, **dict(changes))  # type: ignore[call-overload]
    with pytest.raises(ModelError) as caught:
        convert_gguf(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not list(cache.glob("models/*"))


def test_llama3_scaling_is_recognised_by_its_factors(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    original = tiny_model("llama", rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](original.config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(8) / 8)
    factors = (plain / scaled).float().numpy()
    path = write_gguf(tmp_path / "m.gguf", original, tensors={"rope_freqs.weight": factors})
    assert load(convert_gguf(path)).config.rope_parameters == rope


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_known_scalings_are_kept(keys: dict[str, object], expected: dict[str, object], tmp_path: Path) -> None:
    path = _write(tmp_path, keys={f"llama.rope.scaling.{key}": value for key, value in keys.items()})
    rope = json.loads((convert_gguf(path) / "config.json").read_text())["rope_parameters"]
    assert rope == {"rope_theta": 10000.0, **expected}
