import math

import numpy as np
import pytest
import torch

from secateur.calibration.held_out import Window
from secateur.errors import CorpusError, ModelError
from secateur.evaluation.perplexity import DocumentLoss, compare_perplexity, evaluate_perplexity, summarise
from tests.tiny import tiny_model


def make_windows(lengths, documents=None, seed=0):
    random = np.random.default_rng(seed)
    documents = documents or [f"file{index}" for index in range(len(lengths))]
    return [
        Window(document, random.integers(0, 256, length), length - 1)
        for document, length in zip(documents, lengths, strict=True)
    ]


def slow_nats(model, window):
    """Feed ever longer prefixes, and take the surprise of the token that follows."""
    total = 0.0
    with torch.no_grad():
        for end in range(1, len(window.token_ids)):
            logits = model(torch.from_numpy(window.token_ids[None, :end])).logits[0, -1].double()
            total -= logits.log_softmax(-1)[window.token_ids[end]].item()
    return total


def test_against_one_prefix_at_a_time():
    model = tiny_model("mistral")
    windows = make_windows([40, 7, 40, 12, 40, 40, 40, 2], list("aabcdefg"))
    result = evaluate_perplexity(model, windows, "python")
    nats = [slow_nats(model, window) for window in windows]
    tokens = [39, 6, 39, 11, 39, 39, 39, 1]
    assert [document.document for document in result.documents] == list("abcdefg")
    assert [document.nats for document in result.documents] == pytest.approx([nats[0] + nats[1], *nats[2:]], rel=1e-5)
    assert [document.tokens for document in result.documents] == [45, *tokens[2:]]
    assert (result.n_documents, result.n_tokens, result.n_bytes) == (7, sum(tokens), sum(tokens))
    assert result.perplexity == pytest.approx(math.exp(sum(nats) / sum(tokens)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(nats) / sum(tokens) / math.log(2), rel=1e-5)
    assert 50 < result.perplexity < 5000  # random bytes under random weights


def test_progress_ends_at_the_total():
    calls = []
    evaluate_perplexity(
        tiny_model("llama"), make_windows([9] * 6 + [5]), "x", progress=lambda *call: calls.append(call)
    )
    assert calls == [(4, 7), (7, 7)]


def test_a_likelihood_that_is_not_finite_is_an_error_that_says_where():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(ModelError, match=r"not finite .* 'file0' of python"):
        evaluate_perplexity(model, make_windows([9]), "python")


def test_nothing_to_predict():
    with pytest.raises(CorpusError, match="no token to predict"):
        evaluate_perplexity(tiny_model("llama"), make_windows([1, 1]), "python")


def result_of(**nats):
    return summarise("python", [DocumentLoss(name, value, 10, 30) for name, value in nats.items()])


def test_comparison_over_the_same_documents():
    comparison = compare_perplexity(
        result_of(a=23.0, b=35.0, c=43.0), result_of(a=20.0, b=30.0, c=40.0), "base", comparable=True
    )
    assert comparison.ln_perplexity.value == pytest.approx(11 / 30)
    assert comparison.ratio == pytest.approx(math.exp(11 / 30))
    # Differences in each token are 0.3, 0.5, 0.3: standard deviation 0.11547 over sqrt(3), t = 4.3027.
    assert comparison.ln_perplexity.standard_error == pytest.approx(0.066667, rel=1e-3)
    assert comparison.ratio_high == pytest.approx(math.exp(11 / 30 + 4.3027 * 0.066667), rel=1e-3)
    assert comparison.ratio_low == pytest.approx(math.exp(11 / 30 - 4.3027 * 0.066667), rel=1e-3)
    assert comparison.bits_per_byte.value == pytest.approx(11 / 90 / math.log(2))


def test_comparison_is_in_bits_per_byte_when_tokens_differ_and_only_over_common_documents():
    other = summarise("python", [DocumentLoss("b", 30.0, 7, 30), DocumentLoss("z", 900.0, 7, 30)])
    comparison = compare_perplexity(result_of(a=23.0, b=36.0), other, "base", comparable=False)
    assert comparison.n_documents == 1
    assert comparison.ratio is comparison.ln_perplexity is None
    assert comparison.bits_per_byte.value == pytest.approx(6 / 30 / math.log(2))
    with pytest.raises(CorpusError, match="no document"):
        compare_perplexity(result_of(a=1.0), result_of(b=1.0), "base", comparable=True)


def test_a_ruined_model_has_an_infinite_perplexity():
    assert result_of(a=1e5).perplexity == math.inf
