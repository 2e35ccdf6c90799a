"""What the engine reads out of a config, and what it refuses."""

import json

import pytest

from secateur.errors import ModelError
from secateur.runtime.architecture import NotNativeError, read_architecture


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


def test_what_a_config_leaves_out_is_not_guessed(folders):
    config = json.loads((folders["mistral"] / "config.json").read_text())
    for key in ("max_position_embeddings", "num_key_value_heads", "head_dim"):
        with pytest.raises(NotNativeError, match=f"does not say {key}"):
            read_architecture({name: value for name, value in config.items() if name != key})
    without = {key: value for key, value in config.items() if key not in {"sliding_window", "layer_types"}}
    assert read_architecture(without).sliding_window == 4096  # the family's default
    assert read_architecture({**without, "sliding_window": None}).sliding_window == 0
