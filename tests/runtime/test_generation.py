import pytest
import torch

from secateur.runtime.generation import choose_token, end_of_sequence_ids, generate_token_ids
from secateur.runtime.options import GenerationOptions
from tests.tiny import EOS, tiny_model, tiny_tokenizer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family):
    model = tiny_model(family)
    prompt = list(range(40, 80))  # longer than the sliding window
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, attention_mask=torch.ones(1, 40)
    )[0, 40:].tolist()
    options = GenerationOptions(max_new_tokens=30, ignore_eos=True)
    assert list(generate_token_ids(model, prompt, options, frozenset({EOS}))) == expected


def test_end_of_sequence_ends_unless_ignored():
    model = tiny_model("llama")
    options = GenerationOptions(max_new_tokens=12)
    endless = list(generate_token_ids(model, [1, 2, 3], options, frozenset()))
    assert len(endless) == 12
    end = endless[5]
    first = endless.index(end)
    assert list(generate_token_ids(model, [1, 2, 3], options, frozenset({end}))) == endless[:first]
    ignoring = GenerationOptions(max_new_tokens=12, ignore_eos=True)
    assert list(generate_token_ids(model, [1, 2, 3], ignoring, frozenset({end}))) == endless


def test_end_ids_come_from_lists_and_from_the_tokenizer():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [7, 9]
    model.config.eos_token_id = None
    assert end_of_sequence_ids(model, tiny_tokenizer()) == {7, 9, EOS}


def test_seed_repeats_a_draw_and_leaves_the_callers_random_state_alone():
    model = tiny_model("llama")

    def draw(seed):
        options = GenerationOptions(max_new_tokens=20, temperature=1.0, seed=seed)
        return list(generate_token_ids(model, [1, 2], options, frozenset()))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)
    assert torch.equal(torch.get_rng_state(), before)


def test_inference_mode_does_not_leak_to_the_caller():
    tokens = generate_token_ids(tiny_model("llama"), [1], GenerationOptions(max_new_tokens=3), frozenset())
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    tokens.close()


def frequencies(logits, **options):
    generator = torch.Generator().manual_seed(0)
    choice = GenerationOptions(seed=0, **options)
    drawn = [choose_token(logits, choice, generator) for _ in range(4000)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / len(drawn)


def test_distribution_of_draws():
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = probabilities.log()
    close = {"atol": 0.03, "rtol": 0}
    torch.testing.assert_close(frequencies(logits, temperature=1.0), probabilities, **close)
    sharp = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(logits, temperature=0.5), sharp, **close)
    two = torch.tensor([0, 0.625, 0, 0.375])
    torch.testing.assert_close(frequencies(logits, temperature=1.0, top_k=2), two, **close)
    # 0.5 is not yet 0.7, so the second most likely token stays; the third would start at 0.8.
    torch.testing.assert_close(frequencies(logits, temperature=1.0, top_p=0.7), two, **close)
    assert frequencies(logits, temperature=1.0, top_p=0.01)[1] == 1
    assert frequencies(logits)[1] == 1


def test_unlikely_tokens_are_left_out():
    logits = torch.tensor([4.0, 3.9, 0.0, -9.0])
    assert frequencies(logits, temperature=1.0, min_p=0.5)[2:].sum() == 0
    assert frequencies(logits, temperature=1.0)[2] > 0


def test_tokens_that_occurred_are_less_likely():
    logits = torch.tensor([2.0, 1.5, -1.0])
    options = GenerationOptions(repetition_penalty=2.0)
    assert choose_token(logits, options, torch.Generator()) == 0
    assert choose_token(logits, options, torch.Generator(), [0, 2, 0]) == 1
    below = torch.tensor([-1.0, -1.5])
    assert choose_token(below, options, torch.Generator(), [0]) == 1  # a logit below 0 moves down too
    assert logits.tolist() == [2.0, 1.5, -1.0]  # the caller's logits stay
