import pytest
import torch

from secateur.errors import ModelError
from secateur.models import likelihood
from secateur.models.likelihood import token_log_likelihood
from tests.tiny import tiny_model


def slow_log_likelihood(model, token_ids):
    with torch.no_grad():
        log_probabilities = model(token_ids).logits.float().log_softmax(-1)
    rows = [
        [log_probabilities[b, t - 1, token_ids[b, t]] for t in range(1, token_ids.shape[1])]
        for b in range(len(token_ids))
    ]
    return torch.tensor(rows)


def some_tokens(batch=3, length=50):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_equals_log_softmax_of_full_logits(family, monkeypatch):
    model = tiny_model(family)
    monkeypatch.setattr(likelihood, "_LOGITS_BYTES", 4 * 384 * 7)  # 7 positions: chunks cross the ends of sequences
    monkeypatch.setattr(likelihood, "_pick", limited(likelihood._pick, rows=7))
    token_ids = some_tokens()
    actual = token_log_likelihood(model, token_ids)
    assert actual.dtype == torch.float32
    assert actual.shape == (3, 49)
    torch.testing.assert_close(actual, slow_log_likelihood(model, token_ids), atol=2e-5, rtol=1e-5)


def limited(function, rows):
    """Fail when more than `rows` positions of logits are in float32 at once."""

    def check(logits, targets):
        assert len(logits) <= rows
        return function(logits, targets)

    return check


def test_soft_capping_with_effect():
    capped = tiny_model("gemma2", final_logit_softcapping=1.5)
    plain = tiny_model("gemma2", final_logit_softcapping=None)
    token_ids = some_tokens()
    actual = token_log_likelihood(capped, token_ids)
    torch.testing.assert_close(actual, slow_log_likelihood(capped, token_ids), atol=2e-5, rtol=1e-5)
    assert (actual - token_log_likelihood(plain, token_ids)).abs().max() > 0.5


def test_bf16_is_close_to_full_logits():
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    token_ids = some_tokens()
    torch.testing.assert_close(
        token_log_likelihood(model, token_ids), slow_log_likelihood(model, token_ids), atol=0.05, rtol=0.02
    )


def test_body_runs_once(monkeypatch):
    model = tiny_model("llama")
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(likelihood, "_LOGITS_BYTES", 1)
    token_log_likelihood(model, some_tokens(2, 9))
    assert calls == [1]


def test_scaled_logits_of_an_unknown_kind_fall_back_to_the_models_own():
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    model = CohereForCausalLM(
        CohereConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=300,
            logit_scale=0.3,
            pad_token_id=0,
        )
    ).eval()
    token_ids = some_tokens(2, 20)
    actual = token_log_likelihood(model, token_ids)
    torch.testing.assert_close(actual, slow_log_likelihood(model, token_ids), atol=2e-5, rtol=1e-5)


def test_opt_and_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    models = [
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)),
        OPTForCausalLM(
            OPTConfig(
                vocab_size=300,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=16,
            )
        ),
    ]
    for model in models:
        token_ids = some_tokens(2, 20)
        actual = token_log_likelihood(model.eval(), token_ids)
        torch.testing.assert_close(actual, slow_log_likelihood(model, token_ids), atol=2e-5, rtol=1e-5)


def test_broken_weights_show_in_the_result():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    assert not torch.isfinite(token_log_likelihood(model, some_tokens(1, 8))).any()


def test_single_token_and_wrong_input():
    model = tiny_model("llama")
    assert token_log_likelihood(model, torch.tensor([[5], [6]])).shape == (2, 0)
    with pytest.raises(ModelError, match=r"\[3\]"):
        token_log_likelihood(model, torch.tensor([1, 2, 3]))
    with pytest.raises(ModelError, match="384 tokens"):
        token_log_likelihood(model, torch.tensor([[1, 384]]))
