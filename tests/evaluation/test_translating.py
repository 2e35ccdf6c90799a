"""Translation of a few sentences by a tiny model, and what translations are worth."""

import pytest
from sacrebleu.metrics import BLEU, CHRF

import secateur
from secateur.errors import ConfigError, CorpusError, UnknownNameError
from secateur.evaluation import translating
from secateur.evaluation.harness import evaluate
from secateur.evaluation.journal import Journal
from secateur.evaluation.programs.generation import Asking
from secateur.evaluation.translating import judge, load_sentences
from tests.tiny import save_tiny, tiny_tokenizer

GERMAN = ["Der Hund läuft schnell.", "Die Katze schläft.", "", "x" * 401, "Wir gehen heute nach Hause."]
ENGLISH = ["The dog runs fast.", "The cat sleeps.", "Nothing.", "y", "We are going home today."]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for place, german, english in (
        ("benchmarks/translation/de-en.{}", GERMAN, ENGLISH),
        ("text/translation/{}", [f"Satz {n}" for n in range(9)], [f"sentence {n}" for n in range(9)]),
    ):
        folder = root / place.rpartition("/")[0]
        folder.mkdir(parents=True)
        names = ("src.de", "ref.en") if "benchmarks" in place else ("train.de", "train.en")
        for name, texts in zip(names, (german, english), strict=True):
            (root / place.format(name)).write_text("\n".join(texts) + "\n")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(tmp_path_factory.mktemp("models") / "base", "llama", max_position_embeddings=2048)
    tiny_tokenizer().save_pretrained(made)
    return made


def test_a_sentence_is_asked_after_four_that_are_translated(data):
    loaded = load_sentences("de-en", data, None)
    assert [one.name for one in loaded.sentences] == ["de-en/0", "de-en/1", "de-en/4"]  # not the empty and the long one
    assert loaded.n_sentences == 3
    assert loaded.sentences[1].reference == ENGLISH[1]
    assert loaded.sentences[1].prompt == (
        "Sentences, each translated into English:\n"
        + "".join(f"German: Satz {n}\nTranslation: sentence {n}\n" for n in range(4))
        + "German: Die Katze schläft.\nTranslation:"
    )
    assert len(load_sentences("de-en", data, 2).sentences) == 2


def test_translations_are_worth_what_sacrebleu_says(data):
    loaded = load_sentences("de-en", data, None)
    given = ["The dog runs fast.", " The cat is asleep. ", "home"]
    scores = judge(loaded, [{"completion": one} for one in given])
    wanted = [one.reference for one in loaded.sentences]
    stripped = [one.strip() for one in given]
    for metric, name in ((CHRF(), "chrF"), (BLEU(), "BLEU")):
        share = scores.means[name]
        assert share.value == pytest.approx(metric.corpus_score(stripped, [wanted]).score / 100)
        assert share.low <= share.value <= share.high
    each = [CHRF().sentence_score(one, [other]).score / 100 for one, other in zip(stripped, wanted, strict=True)]
    assert list(scores.values.values()) == pytest.approx(each)
    assert scores.main.value == pytest.approx(sum(each) / 3)
    assert scores.values["de-en/0"] == pytest.approx(1.0)
    assert scores.values["de-en/0"] > scores.values["de-en/1"] > scores.values["de-en/4"]


def test_meteor_is_told_where_wordnet_is(data, monkeypatch):
    loaded = load_sentences("de-en", data, None)
    answers = [{"completion": one.reference} for one in loaded.sentences]

    class WordNet:
        there = False

        @classmethod
        def ensure_loaded(cls):
            if not cls.there:
                raise LookupError

        @staticmethod
        def get_version():
            return "3.0"

    monkeypatch.setattr("nltk.corpus.wordnet", WordNet)
    loaded = load_sentences("de-en", data, None)
    assert loaded.described()["meteor"] is None
    assert "METEOR" not in judge(loaded, answers).means
    WordNet.there = True
    seen = []
    monkeypatch.setattr(
        "nltk.translate.meteor_score.meteor_score",
        lambda wanted, given: seen.append(given) or float(wanted == [given]) / 2,
    )
    loaded = load_sentences("de-en", data, None)
    assert loaded.described()["meteor"].endswith("WordNet 3.0")
    assert judge(loaded, answers).means["METEOR"].value == 0.5
    assert seen[0] == ["The", "dog", "runs", "fast", "."]


def test_a_run_is_gone_on_with_and_compared(data, folder, tmp_path):
    model, loaded = secateur.load(folder), load_sentences("de-en", data, None)
    with Journal(tmp_path / "a.jsonl") as journal:
        loaded.ask(model, journal, lambda *_: None, 2)
        whole = list(journal.records)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:9])
    with Journal(tmp_path / "b.jsonl") as journal:
        assert len(journal.records) == 2
        loaded.ask(model, journal, lambda *_: None, 2)
        assert journal.records == whole
    found = evaluate(
        folder, "translation:de-en", against=folder, data=data, output=tmp_path / "out", asking=Asking(batch=2)
    )
    cell = found.cell("translation:de-en", str(folder))
    assert cell.result == judge(loaded, whole)
    assert found.benchmarks["translation:de-en"]["problems_of_task"] == 3
    assert "chrF of sentences of translation:de-en" in found.to_table()


def test_what_is_asked_is_known_by_its_hash(data, monkeypatch):
    known = load_sentences("de-en", data, None).sha256
    assert load_sentences("de-en", data, 2).sha256 != known
    monkeypatch.setattr(translating, "SHOTS", 3)
    assert load_sentences("de-en", data, None).sha256 != known


def test_a_sentence_that_does_not_fit_is_named_at_once(data, tmp_path):
    model = secateur.load(save_tiny(tmp_path / "short", "llama", max_position_embeddings=256))
    with (
        Journal(tmp_path / "a.jsonl") as journal,
        pytest.raises(ConfigError, match=r"de-en/0 cannot be asked: prompt of"),
    ):
        load_sentences("de-en", data, None).ask(model, journal, lambda *_: None, 2)


def test_what_cannot_be_translated_is_said(data, tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match=r"put benchmarks/translation/fr-de\.src\.fr into a folder"):
        load_sentences("fr-de", data, None)
    with pytest.raises(CorpusError, match=r"train\.de has 3 lines and .*train\.en 2"):
        broken = tmp_path / "data"
        for name in ("benchmarks/translation/de-en.src.de", "benchmarks/translation/de-en.ref.en"):
            (broken / name).parent.mkdir(parents=True, exist_ok=True)
            (broken / name).write_bytes((data / name).read_bytes())
        (broken / "text/translation").mkdir(parents=True)
        (broken / "text/translation/train.de").write_text("a\nb\nc\n")
        (broken / "text/translation/train.en").write_text("a\nb\n")
        load_sentences("de-en", broken, None)
    with pytest.raises(UnknownNameError, match="translation:de-en"):
        evaluate("demo", "translation:de-pl", output=tmp_path / "out")
    monkeypatch.setattr(translating, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'secateur\[lm-eval\]'"):
        load_sentences("de-en", data, None)
