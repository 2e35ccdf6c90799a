"""What llama.cpp would compute otherwise than transformers is refused before a GGUF is written."""

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.errors import ModelError
from secateur.models.gguf_keys import full_config, model_metadata, rope_factors
from tests.tiny import tiny_config

ROPE = {"rope_theta": 10000.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

REFUSED = {
    "family": ("gemma3", {}, "'gemma3_text' cannot be written"),
    "activation": ("llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
    "biases": ("qwen3", {"attention_bias": True}, "biases in its attention"),
    "window": ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "a sliding window"),
    "scaling": ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "scaling 'dynamic'"),
    "part": ("llama", {"rope_parameters": ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5}}, "factor 0.5"),
    "yarn": ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "'yarn' with beta_fast 16.0"),
    "attention": ("llama", {"rope_parameters": YARN | {"attention_factor": 0.5}}, "attention_factor 0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_would_compute_otherwise_is_refused_by_name(case):
    family, changes, message = REFUSED[case]
    with pytest.raises(ModelError, match=message) as caught:
        full_config(tiny_config(family, **changes).to_dict())
    assert "--format dense" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_position_embeddings", -1), ("vocab_size", 10**12), ("num_key_value_heads", 0), ("rms_norm_eps", -1e-6),
     ("rope_parameters", ROPE | {"rope_type": "linear", "factor": 0.0})],
)  # fmt: skip
def test_numbers_that_no_model_has(key, value):
    with pytest.raises(ModelError, match=f"config.json has {'factor' if 'rope' in key else key} "):
        full_config(tiny_config("llama").to_dict() | {key: value})


@pytest.mark.parametrize(("window", "length"), [(32, 32), (4096, 256), (None, 256)])
def test_the_context_ends_where_llama_cpp_would_see_past_the_window(window, length):
    config = full_config(tiny_config("mistral", sliding_window=window, max_position_embeddings=256).to_dict())
    assert model_metadata(config, "x")["llama.context_length"] == length


def test_a_config_that_transformers_refuses():
    with pytest.raises(ModelError, match="describes no llama that transformers knows"):
        full_config({"model_type": "llama", "hidden_size": "wide"})


def test_older_names_of_the_rotary_parameters_are_understood():
    config = {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    metadata = model_metadata(full_config(config), "x")
    assert metadata["llama.rope.freq_base"] == 500.0
    assert (metadata["llama.rope.scaling.type"], metadata["llama.rope.scaling.factor"]) == ("linear", 2.0)


@pytest.mark.parametrize("context", [64, 8192])
def test_factors_are_those_of_transformers(context):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    original = tiny_config("llama", rope_parameters=rope | {"original_max_position_embeddings": context})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](original, "cpu")
    factors = rope_factors(full_config(original.to_dict()))
    assert factors is not None and factors.dtype == np.float32
    np.testing.assert_allclose(factors, (1 / 5e5 ** (torch.arange(8) / 8) / scaled).numpy(), rtol=1e-5)
    assert rope_factors(full_config(tiny_config("llama").to_dict())) is None
