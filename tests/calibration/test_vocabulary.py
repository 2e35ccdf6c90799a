"""Which tokens a smaller vocabulary is to have."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from secateur.calibration import vocabulary
from secateur.calibration.corpora import load_corpus
from secateur.calibration.documents import TRAIN
from secateur.calibration.vocabulary import expected_tokens, more_tokens, rank_tokens
from secateur.errors import CorpusError, ModelError
from tests.calibration.texts import word_tokenizer, write_json_lines

# Ids follow this order. Of the text's words `late` comes last.
WORDS = ["never", "naïve", "value", "while", "late", "chat", "    "]


def domain(tmp_path, name, text):
    records = [{"package": "p", "path": f"{i}.py", "text": f"{text} {i}\n" * 20} for i in range(40)]
    return str(write_json_lines(tmp_path / f"{name}.jsonl", records))


def ranked(mixture, tokenizer=None, **options):
    tokenizer = tokenizer or word_tokenizer(WORDS)
    found = rank_tokens(mixture, tokenizer, **options)
    needed, others = (
        tokenizer.convert_ids_to_tokens([int(one) for one in ids]) for ids in (found.needed, found.others)
    )
    assert not set(needed) & set(others)
    assert len(needed) + len(others) == len(tokenizer)
    return needed, others


def test_what_a_domain_writes_most_comes_first_and_then_plain_words(tmp_path):
    path = domain(tmp_path, "a", "late late late value value naïve")
    _, others = ranked(((path, 1.0),))
    first = [word for word in others if word in ("late", "value", "never", "while", "na\u00c3\u00afve")]
    assert first == ["late", "value", "na\u00c3\u00afve", "never", "while"]
    foreign = [word for word in others if not word.isascii() and "\u0120" not in word]
    assert foreign[0] == "na\u00c3\u00afve"
    assert set(foreign[1:]) == set(others[-len(foreign) + 1 :])  # not plain, and in no text


def test_weights_of_domains_decide_between_their_words(tmp_path):
    first, second = domain(tmp_path, "a", "late " * 9), domain(tmp_path, "b", "value " * 9)
    for weight, expected in ((0.7, ["late", "value"]), (0.3, ["value", "late"])):
        _, others = ranked(((first, weight), (second, 1 - weight)))
        assert [word for word in others if word in ("late", "value")] == expected


def test_bytes_specials_white_space_the_chat_and_what_configs_name_are_needed(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = "{% for m in messages %}chat{{ m.content }}{% endfor %}"
    named = tokenizer.convert_tokens_to_ids("never")
    needed, _ = ranked(((domain(tmp_path, "a", "value"), 1.0),), tokenizer, always=[named, -1])
    assert {"never", "chat", "<s>", "</s>", "\u0120\u0120\u0120\u0120", "a", "\u00c3"} <= set(needed)
    assert not {"value", "while", "nev"} & set(needed)


def test_a_tokenizer_that_knows_nothing_is_refused(tmp_path):
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ModelError, match="finds no token"):
        rank_tokens(((domain(tmp_path, "a", "value"), 1.0),), empty)


def test_how_many_more_tokens_held_out_text_takes(tmp_path, monkeypatch):
    path = domain(tmp_path, "a", "value")
    mixture, larger, smaller = ((path, 1.0),), word_tokenizer(WORDS), word_tokenizer(WORDS[:2])
    assert more_tokens(mixture, larger, larger) == {path: 0.0}
    more = more_tokens(mixture, larger, smaller)[path]
    assert 0.5 < more < 4  # `value` takes five tokens in place of one

    def missing(*_):
        raise CorpusError("none")

    monkeypatch.setattr(vocabulary, "load_corpus", missing)
    assert more_tokens(mixture, larger, smaller) == {path: None}


def test_one_document_in_five_is_left_out_of_the_order_and_counted_apart(tmp_path):
    def write(word_of):
        records = [{"package": "p", "path": f"{i}.py", "text": f"{word_of(f'p/{i}.py')} " * 30} for i in range(60)]
        return str(write_json_lines(tmp_path / "a.jsonl", records))

    path = write(lambda _: "value")
    left_out = {one.name for one in load_corpus(path, TRAIN, None).documents[::5]}
    assert len(left_out) > 5
    write(lambda name: "late" if name in left_out else "value")
    _, order = ranked(((path, 1.0),), leave_out=True)
    assert order.index("value") < order.index("while") < order.index("late")
    tokenizer = word_tokenizer(WORDS)
    shares, ids = expected_tokens(((path, 1.0),), tokenizer), tokenizer.get_vocab()
    assert ids["late"] in shares
    assert ids["value"] not in shares
    assert sum(shares.values()) == pytest.approx(1)


def test_too_few_documents_to_leave_one_out(tmp_path):
    records = [{"package": "p", "path": f"{i}.py", "text": "value " * 30} for i in range(4)]
    path = str(write_json_lines(tmp_path / "a.jsonl", records))
    with pytest.raises(CorpusError, match="give --vocabulary"):
        expected_tokens(((path, 1.0),), word_tokenizer(WORDS))
