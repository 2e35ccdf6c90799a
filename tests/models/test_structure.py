import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.errors import ModelError
from secateur.models.structure import embedding_weights, find_blocks
from tests.tiny import FAMILIES, tiny_model

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_blocks_and_their_linears(family):
    model = tiny_model(family)
    blocks = find_blocks(model)
    assert [(block.index, block.name) for block in blocks] == [(i, f"model.layers.{i}") for i in range(3)]
    for block in blocks:
        assert block.prunable == LINEARS
        assert all(
            model.get_parameter(block.weight_name(linear)) is model.get_submodule(block.name).get_parameter(
                f"{linear}.weight"
            )
            for linear in LINEARS
        )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_embedding_and_head_tied_or_not(family):
    model = tiny_model(family)
    assert embedding_weights(model) == ("model.embed_tokens.weight", "lm_head.weight")
    tied = model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    assert tied is model.config.tie_word_embeddings


def test_one_block_is_a_list_too():
    assert [block.name for block in find_blocks(tiny_model("llama", num_hidden_layers=1))] == ["model.layers.0"]


def test_a_list_of_another_length_is_refused():
    model = tiny_model("llama")
    model.model.layers.append(nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM were not understood: expected one list of 3 .* found none"):
        find_blocks(model)


def test_two_lists_of_the_same_length_are_refused():
    model = tiny_model("llama")
    model.model.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    with pytest.raises(ModelError, match=r"found model\.layers, model\.more"):
        find_blocks(model)


def test_a_parameter_that_is_no_linear_weight_is_refused_by_name_and_shape():
    model = tiny_model("llama")
    model.model.layers[1].mlp.experts = nn.Embedding(3, 5)
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.mlp\.experts \(Embedding\) was not .* 'weight' has shape \[3, 5\]"
    ):
        find_blocks(model)


def test_a_subclass_of_linear_may_compute_something_else():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = Scaled(64, 160)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj \(Scaled\)"):
        find_blocks(model)


def test_experts_are_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mixtral", num_hidden_layers=2, num_local_experts=4, vocab_size=64, **sizes)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.\w+ \(Mixtral.*this architecture is not supported"):
        find_blocks(AutoModelForCausalLM.from_config(config))


def test_gpt2_is_refused():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    with pytest.raises(ModelError, match="blocks of GPT2LMHeadModel were not understood"):
        find_blocks(AutoModelForCausalLM.from_config(config))
