import pytest
import torch

from secateur.errors import ConfigError
from secateur.runtime.generation import (
    GenerationOptions,
    choose_token,
    cut_at_stop,
    decode_pieces,
    encode_prompt,
    end_of_sequence_ids,
    generate_token_ids,
)
from tests.tiny import BOS, EOS, tiny_model, tiny_tokenizer

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


TEXT = "naïve 世界 — 🦀🦀 = «ok» e\u0301"


def test_pieces_are_whole_characters_and_join_to_the_text():
    tokenizer = tiny_tokenizer()
    token_ids = tokenizer(TEXT)["input_ids"]
    assert len(token_ids) == len(TEXT.encode()) > len(TEXT)  # one token a byte: every character is split
    pieces = list(decode_pieces(token_ids, tokenizer, tokenizer("prompt")["input_ids"]))
    assert pieces == list(TEXT)


def test_pieces_come_as_soon_as_their_bytes_are_there():
    tokenizer = tiny_tokenizer()
    taken = []

    def source():
        for token_id in tokenizer("aé🦀")["input_ids"]:
            taken.append(token_id)
            yield token_id

    assert [(piece, len(taken)) for piece in decode_pieces(source(), tokenizer, [])] == [("a", 1), ("é", 3), ("🦀", 7)]


def test_broken_bytes_and_special_tokens():
    tokenizer = tiny_tokenizer()
    half = tokenizer("世")["input_ids"][:2]
    a, b = tokenizer("ab")["input_ids"]
    assert "".join(decode_pieces([a, *half, b], tokenizer, [])) == "a\ufffdb"
    assert list(decode_pieces([a, *half], tokenizer, [])) == ["a", "\ufffd"]
    assert list(decode_pieces([BOS, a, EOS, b, BOS], tokenizer, [])) == ["a", "b"]
    # A prompt that ends inside a character: the first new token completes it.
    assert "".join(decode_pieces([a], tokenizer, half)) == "a"


def test_leading_space_of_sentencepiece_tokenizers_is_kept():
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"▁def": 0, "▁f": 1, "(x)": 2, "[UNK]": 3}, unk_token="[UNK]"))  # noqa: S106
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.decode([1]) == "f"  # the trap
    assert list(decode_pieces([1, 2], tokenizer, [0])) == [" f", "(x)"]


@pytest.mark.parametrize("stop", [["\n\n"], ["END"], ["ab", "b\n"], ["aab"], ["no such"], ["NDE", "END"], ["abab\n"]])
def test_stop_strings_do_not_depend_on_how_text_is_cut(stop):
    text = "aababab\n\nENDE"
    cuts = [text.find(item) for item in stop if item in text]
    expected = text[: min(cuts)] if cuts else text
    for size in range(1, len(text) + 1):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        out = list(cut_at_stop(pieces, stop))
        assert "".join(out) == expected
        assert all(out)


def test_nothing_is_generated_after_a_stop_string():
    def source():
        yield from ["x", "#", "#"]
        raise AssertionError("asked for more")

    assert list(cut_at_stop(source(), ["##"])) == ["x"]


def test_text_that_cannot_start_a_stop_string_is_not_held_back():
    stream = cut_at_stop(iter(["abc", "#", "d"]), ["##"])
    assert next(stream) == "abc"
    assert next(stream) == "#d"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, r"temperature is -0\.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"stop": ["x", ""]}, "empty stop"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerationOptions(**options)


def test_a_single_stop_string_is_one_string():
    assert GenerationOptions(stop="def").stop == ("def",)


def test_prompts():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert encode_prompt("", model, tokenizer, 1) == [BOS]
    assert len(encode_prompt("a" * 200, model, tokenizer, 56)) == 200
    with pytest.raises(ConfigError, match="200 tokens and 57 new ones exceed the 256"):
        encode_prompt("a" * 200, model, tokenizer, 57)
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="prompt is empty"):
        encode_prompt("", model, tokenizer, 1)
