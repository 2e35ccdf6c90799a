import pytest

from secateur.errors import ConfigError
from secateur.runtime.engine import TokenizersCodec
from secateur.runtime.generation import TransformersCodec
from secateur.runtime.text import cut_at_stop, decode_pieces, encode_prompt
from tests.tiny import BOS, EOS, tiny_tokenizer

CODECS = {
    "transformers": TransformersCodec,
    "tokenizers": lambda tokenizer: TokenizersCodec(tokenizer.backend_tokenizer, tokenizer.bos_token_id),
}


@pytest.fixture(params=CODECS)
def wrap(request):
    return CODECS[request.param]


@pytest.fixture
def codec(wrap):
    return wrap(tiny_tokenizer())


TEXT = "naïve 世界 — 🦀🦀 = «ok» e\u0301"


def test_pieces_are_whole_characters_and_join_to_the_text(codec):
    token_ids = codec.encode(TEXT)
    assert len(token_ids) == len(TEXT.encode()) > len(TEXT)  # one token a byte: every character is split
    pieces = list(decode_pieces(token_ids, codec, codec.encode("prompt")))
    assert pieces == list(TEXT)


def test_pieces_come_as_soon_as_their_bytes_are_there(codec):
    taken = []

    def source():
        for token_id in codec.encode("aé🦀"):
            taken.append(token_id)
            yield token_id

    assert [(piece, len(taken)) for piece in decode_pieces(source(), codec, [])] == [("a", 1), ("é", 3), ("🦀", 7)]


def test_broken_bytes_and_special_tokens(codec):
    half = codec.encode("世")[:2]
    a, b = codec.encode("ab")
    assert "".join(decode_pieces([a, *half, b], codec, [])) == "a\ufffdb"
    assert list(decode_pieces([a, *half], codec, [])) == ["a", "\ufffd"]
    assert list(decode_pieces([BOS, a, EOS, b, BOS], codec, [])) == ["a", "b"]
    # A prompt that ends inside a character: the first new token completes it.
    assert "".join(decode_pieces([a], codec, half)) == "a"


def test_leading_space_of_sentencepiece_tokenizers_is_kept(wrap):
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"▁def": 0, "▁f": 1, "(x)": 2, "[UNK]": 3}, unk_token="[UNK]"))  # noqa: S106
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.decode([1]) == "f"  # the trap
    assert list(decode_pieces([1, 2], wrap(tokenizer), [0])) == [" f", "(x)"]


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


def test_prompts(wrap, codec):
    assert encode_prompt("", codec, 1, 256) == [BOS]
    assert len(encode_prompt("a" * 200, codec, 56, 256)) == 200
    with pytest.raises(ConfigError, match="200 tokens and 57 new ones exceed the 256"):
        encode_prompt("a" * 200, codec, 57, 256)
    assert len(encode_prompt("a" * 200, codec, 57, None)) == 200
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="prompt is empty"):
        encode_prompt("", wrap(tokenizer), 1, None)


def test_prompt_begins_as_the_tokenizer_says(wrap):
    assert encode_prompt("a", wrap(tiny_tokenizer(add_bos=True)), 1, None)[0] == BOS
