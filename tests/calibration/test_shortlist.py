"""Which tokens a trimmed head keeps."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from secateur.calibration import domain_tokens, shortlist
from secateur.calibration.documents import Document
from secateur.calibration.shortlist import choose_tokens
from secateur.errors import CorpusError
from tests.calibration.texts import word_tokenizer, write_json_lines

WORDS = ["value", "while", "naïve", "unseen", "system", "human", "    "]
SPECIALS = 2


@pytest.fixture
def domain(tmp_path):
    """Files whose train and held-out parts share the words `value` and `while`, as a mixture of one path."""
    texts = {f"{i}.py": f"while value{i}: value = value + naïve {i}\n" * 20 for i in range(40)}
    records = [{"package": "p", "path": path, "text": text} for path, text in texts.items()]
    return ((str(write_json_lines(tmp_path / "text.jsonl", records)), 1.0),)


def choose(domain, tokenizer, vocabulary=None, **options):
    found = choose_tokens(domain, tokenizer, vocabulary or len(tokenizer), **options)
    assert (np.diff(found.token_ids) > 0).all()
    assert found.token_ids.dtype == np.int32
    return found, {tokenizer.convert_ids_to_tokens(int(i)) for i in found.token_ids}


def test_tokens_of_the_text_bytes_specials_and_white_space_are_in(domain, monkeypatch):
    monkeypatch.setattr(shortlist, "SHARE", 0)
    tokenizer = word_tokenizer(WORDS)
    found, tokens = choose(domain, tokenizer)
    assert {"value", "while", "na\u00c3\u00afve", "<s>", "</s>", "\u0120\u0120\u0120\u0120"} <= tokens
    assert not {"unseen", "system", "human", "valu"} & tokens
    assert set(range(256)) <= set(found.token_ids.tolist())
    assert found.coverage == {domain[0][0]: 1.0}
    assert found.provenance[0].domain == domain[0][0]


def test_plain_tokens_with_low_ids_fill_the_share(domain, monkeypatch):
    tokenizer = word_tokenizer(WORDS)
    monkeypatch.setattr(shortlist, "SHARE", 0)
    few, _ = choose(domain, tokenizer)
    monkeypatch.setattr(shortlist, "SHARE", (len(few.token_ids) + 3) / len(tokenizer))
    more, _ = choose(domain, tokenizer)
    added = sorted(set(more.token_ids.tolist()) - set(few.token_ids.tolist()))
    assert len(added) in (2, 3)  # the share is rounded down
    left_out = [i for i in range(len(tokenizer)) if i not in set(more.token_ids.tolist())]
    plain = [i for i in left_out if tokenizer.decode([i]).isascii()]
    assert max(added) < min(plain)
    assert all(tokenizer.decode([i]).isascii() for i in added)


def test_the_chat_template_and_the_tokens_of_the_config_are_in(domain, monkeypatch):
    monkeypatch.setattr(shortlist, "SHARE", 0)
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "human {{ m.content }}{% endfor %}"
    )
    unseen = tokenizer.convert_tokens_to_ids("unseen")
    _, tokens = choose(domain, tokenizer, always=[unseen, -1, 10**6])
    assert {"human", "unseen"} <= tokens


def test_rows_beyond_the_tokenizer_are_left_out_and_tokens_beyond_the_rows_ignored(domain):
    tokenizer = word_tokenizer(WORDS)
    found, _ = choose(domain, tokenizer, vocabulary=1000)
    assert found.token_ids.max() < len(tokenizer)
    assert found.vocabulary == 1000
    found, _ = choose(domain, tokenizer, vocabulary=250)
    assert found.token_ids.max() < 250


def test_bytes_of_sentencepiece_are_in(domain, monkeypatch):
    monkeypatch.setattr(shortlist, "SHARE", 0)
    vocabulary = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}, "<0xZZ>": 257, "word": 258}
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    _, tokens = choose(domain, tokenizer)
    assert {f"<0x{i:02X}>" for i in range(256)} <= tokens
    assert not {"<0xZZ>", "word"} & tokens


def test_coverage_is_that_of_held_out_text(domain, monkeypatch):
    monkeypatch.setattr(shortlist, "SHARE", 0)
    tokenizer = word_tokenizer(["value", "while", "unseen"])
    loaded = shortlist.load_corpus

    def other_words(name, split, data):
        corpus = loaded(name, split, data)
        if split == "train":
            return corpus
        text = "while unseen"  # three tokens: while, the space, and one that does not occur in training
        return type(corpus)(name, split, (Document("x", text),), corpus.provenance)

    monkeypatch.setattr(shortlist, "load_corpus", other_words)
    found, _ = choose(domain, tokenizer)
    assert found.coverage == {domain[0][0]: pytest.approx(2 / 3, abs=1e-6)}
    assert found.to_dict()["coverage"] == found.coverage


def test_no_held_out_text_is_no_coverage_and_no_text_is_an_error(domain, monkeypatch):
    loaded = shortlist.load_corpus

    def missing(split_that_lacks):
        def load(name, split, data):
            if split == split_that_lacks:
                raise CorpusError("none")
            return loaded(name, split, data)

        return load

    monkeypatch.setattr(shortlist, "load_corpus", missing("held_out"))
    assert choose(domain, word_tokenizer(WORDS))[0].coverage == {domain[0][0]: None}
    monkeypatch.setattr(shortlist, "load_corpus", missing("train"))
    with pytest.raises(CorpusError):
        choose(domain, word_tokenizer(WORDS))


def test_of_a_large_corpus_a_seeded_part_is_read(domain, monkeypatch):
    monkeypatch.setattr(domain_tokens, "MAX_CHARACTERS", 1000)
    read = []
    real = domain_tokens.encoded

    def encoded(texts, tokenizer):
        texts = list(texts)
        read.append(texts)
        return real(texts, tokenizer)

    monkeypatch.setattr(shortlist, "encoded", encoded)
    for seed in (0, 0, 1):
        choose(domain, word_tokenizer(WORDS), seed=seed)
    first, again, other = read[0], read[3], read[6]
    assert first == again
    assert first != other
    assert 1000 <= sum(map(len, first)) < 2500
