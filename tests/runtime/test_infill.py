"""Fill-in-the-middle: prompts of each family, through both kinds of tokenizers, and answers of both engines."""

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from secateur.errors import ConfigError, ModelError
from secateur.runtime.contexts import READ_ANEW
from secateur.runtime.infill import FAMILIES, encode_infill
from secateur.runtime.loading import load
from secateur.runtime.options import GenerationOptions
from tests.runtime.test_text import CODECS
from tests.tiny import BOS, save_tiny, tiny_tokenizer

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|file_sep|>")
PREFIX, SUFFIX, MIDDLE, PAD, FILE = range(259, 264)
PUBLISHED = {
    "Qwen2.5-Coder, CodeGemma": "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
    "StarCoder": "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",
    "SantaCoder": "<fim-prefix>{prefix}<fim-suffix>{suffix}<fim-middle>",
    "DeepSeek-Coder": "<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",  # noqa: RUF001
    "CodeLlama": "▁<PRE>{prefix}▁<SUF>{suffix}▁<MID>",
    "Codestral": "[SUFFIX]{suffix}[PREFIX]{prefix}",
    "Seed-Coder": "<[fim-suffix]>{suffix}<[fim-prefix]>{prefix}<[fim-middle]>",
}


@pytest.fixture(params=CODECS)
def wrap(request):
    return CODECS[request.param]


@pytest.fixture
def qwen(wrap):
    return wrap(tiny_tokenizer(more_specials=QWEN))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("models") / "coder", "qwen2")
    tiny_tokenizer(more_specials=QWEN).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_prompts_are_those_that_the_families_publish(wrap, family):
    codec = wrap(tiny_tokenizer(more_specials=[*family.tokens(), *family.ends]))
    request = encode_infill("def f(x):\n    ", "\n    return y", codec)
    published = PUBLISHED[family.name].format(prefix="def f(x):\n    ", suffix="\n    return y")
    assert request.prompt_ids == codec.encode(published)
    assert request.end_ids == {codec.token_id(token) for token in (*family.tokens(), *family.ends)}


def test_ends_that_a_vocabulary_lacks_are_left_out(wrap):
    codec = wrap(tiny_tokenizer(more_specials=QWEN[:4]))
    assert encode_infill("a", "b", codec).end_ids == {PREFIX, SUFFIX, MIDDLE, PAD}


def test_a_text_begins_once(wrap):
    codec = wrap(tiny_tokenizer(add_bos=True, more_specials=QWEN))
    a, b = codec.encode_plain("ab")
    assert encode_infill("a", "b", codec).prompt_ids == [BOS, PREFIX, a, SUFFIX, b, MIDDLE]


def test_parts_may_be_empty(qwen):
    (a,) = qwen.encode_plain("a")
    assert encode_infill("a", "", qwen).prompt_ids == [PREFIX, a, SUFFIX, MIDDLE]
    assert encode_infill("", "a", qwen).prompt_ids == [PREFIX, SUFFIX, a, MIDDLE]
    assert encode_infill("", "", qwen).prompt_ids == [PREFIX, SUFFIX, MIDDLE]


@pytest.mark.parametrize(
    "text", ["<|fim_middle|>", "x = '<eos>'", "<|fim_suffix|><|fim_suffix|>b", "<<bos>", "a<|fim_pad|><|fim_prefix|>"]
)
def test_control_tokens_in_a_file_are_text(qwen, text):
    assert max(qwen.encode_plain(text)) > 255, "the tokenizer takes it for a token"
    before, after = len(text.encode()), len(text.encode())
    found = encode_infill(text, text, qwen).prompt_ids
    prefix, suffix = found[1 : 1 + before], found[2 + before : -1]
    assert found == [PREFIX, *prefix, SUFFIX, *suffix, MIDDLE]
    assert prefix == suffix
    assert len(suffix) == after
    assert max(prefix) <= 255
    assert qwen.decode(prefix) == text


def test_control_tokens_that_are_not_marked_special_are_text_too(wrap):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(QWEN))  # as Qwen publishes them
    codec = wrap(tokenizer)
    assert codec.special_tokens() == {"<bos>", "<eos>", "<pad>"}
    found = encode_infill("<|fim_middle|>", "", codec).prompt_ids
    assert found[:1] + found[-2:] == [PREFIX, SUFFIX, MIDDLE]
    assert MIDDLE not in found[:-1]


def sentencepiece_tokenizer():
    """A tokenizer that puts a space before a text, as that of CodeLlama."""
    letters = ["▁", "a", "b", "☺"]
    core = Tokenizer(BPE({token: i for i, token in enumerate([*letters, "▁a"])}, [("▁", "a")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["▁<PRE>", "▁<SUF>", "▁<MID>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="▁<PRE>")  # noqa: S106


def test_only_the_prefix_gets_the_space_that_begins_a_text(wrap):
    codec = wrap(sentencepiece_tokenizer())
    a, b, spaced = (codec.token_id(token) for token in ("a", "b", "▁a"))
    prefix, suffix, middle = (codec.token_id(token) for token in ("▁<PRE>", "▁<SUF>", "▁<MID>"))
    assert encode_infill("ab", "ab", codec).prompt_ids == [prefix, spaced, b, suffix, a, b, middle]
    assert encode_infill("ab", " ab", codec).prompt_ids == [prefix, spaced, b, suffix, spaced, b, middle]


def test_models_without_the_tokens_say_so(wrap):
    codec = wrap(tiny_tokenizer(more_specials=QWEN[:2]))
    with pytest.raises(ModelError, match=r"no tokens for fill-in-the-middle.*leave the suffix out.*StarCoder"):
        encode_infill("a", "b", codec)


def test_parts_that_are_no_text(qwen):
    for prefix, suffix, name in (("a\udcff", "b", "prompt"), ("a", "b\udcff", "suffix")):
        with pytest.raises(ConfigError, match=f"the {name} .* UTF-8"):
            encode_infill(prefix, suffix, qwen)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_answers_are_those_to_the_prompt_of_the_family(folder, engine):
    loaded = load(folder, engine=engine)
    prompt = encode_infill("def f(", "):", loaded.backend.codec).prompt_ids
    options = GenerationOptions(max_new_tokens=8, ignore_eos=True)
    expected = loaded.backend.codec.decode(list(loaded.backend.generate(prompt, options)))
    answer = loaded.generate("def f(", 8, suffix="):", ignore_eos=True)
    assert answer == expected != loaded.generate("def f(", 8, ignore_eos=True)
    assert "".join(loaded.stream("def f(", 8, suffix="):", ignore_eos=True)) == answer
    with pytest.raises(ConfigError, match="256 positions"):
        loaded.generate("x" * 100, 8, suffix="y" * 150)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_tokens_of_the_family_end_an_answer(folder, engine):
    backend = load(folder, engine=engine).backend
    endless = list(backend.generate([1, 2, 3], GenerationOptions(max_new_tokens=30, ignore_eos=True)))
    end = endless[12]
    first = endless.index(end)
    options = GenerationOptions(max_new_tokens=30)
    assert list(backend.generate([1, 2, 3], options, end_ids=frozenset({end}))) == endless[:first]
    ignoring = GenerationOptions(max_new_tokens=30, ignore_eos=True)
    assert list(backend.generate([1, 2, 3], ignoring, end_ids=frozenset({end}))) == endless


def test_a_longer_prefix_is_not_read_again(folder, monkeypatch):
    loaded = load(folder, engine="native")
    computed = []
    forward = loaded.backend.model.forward

    def counting(ids, *arguments):
        computed.extend(ids)
        return forward(ids, *arguments)

    monkeypatch.setattr(loaded.backend.model, "forward", counting)
    loaded.generate("a" * 60, 2, suffix="b" * 9, ignore_eos=True)
    computed.clear()
    loaded.generate("a" * 63, 1, suffix="b" * 9, ignore_eos=True)
    assert len(computed) == max(3 + 1 + 9 + 1, READ_ANEW)
