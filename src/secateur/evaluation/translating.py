"""Translation: sentences of a benchmark, asked after some that are translated, compared with a reference.

BLEU and chrF are those of sacrebleu. METEOR is that of nltk, for translations into English and where it finds WordNet
(`python -m nltk.downloader wordnet`, or a folder that NLTK_DATA names); without it there is none. Models are compared
by the mean chrF of sentences.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from secateur.calibration.sources import data_folder, read_bytes
from secateur.errors import ConfigError, CorpusError
from secateur.evaluation.drawing import drawn
from secateur.evaluation.folder import hash_of
from secateur.evaluation.journal import Journal
from secateur.evaluation.proportions import Share, mean_share
from secateur.evaluation.scores import Scores
from secateur.runtime.loaded import LoadedModel
from secateur.runtime.text import check_prompt

PAIRS = ("en-de", "de-en", "de-fr", "fr-de")
SHOTS = 4
_NAMES = {"en": "English", "de": "German", "fr": "French"}
_NEW_TOKENS = 160
_LONGEST = 400  # characters of a sentence that is asked
_RESAMPLES = 1000


@dataclass(frozen=True)
class Sentence:
    """A sentence, what stands before it in the prompt, and its translation by a person."""

    name: str
    prompt: str
    reference: str


@dataclass(frozen=True)
class Sentences:
    """Sentences that are to be translated; see `secateur.evaluation.asked.Answered`.

    `n_sentences` is how many the benchmark has, `meteor` what computes METEOR, if anything.
    """

    pair: str
    sentences: tuple[Sentence, ...]
    n_sentences: int
    meteor: str | None

    @property
    def sha256(self) -> str:
        """Return a SHA-256 of all that is asked and of the references."""
        parts = (part for one in self.sentences for part in (one.name, one.prompt, one.reference))
        return hash_of(str(_NEW_TOKENS), *parts)

    def described(self) -> dict[str, Any]:
        """Return what results depend on."""
        import sacrebleu

        version = str(sacrebleu.__version__)
        return {
            "sha256": self.sha256,
            "problems": len(self.sentences),
            "problems_of_task": self.n_sentences,
            "shots": SHOTS,
            "sacrebleu": version,
            "meteor": self.meteor,
        }

    def ask(self, model: LoadedModel, journal: Journal, progress: Callable[[int, int], None], batch: int) -> Scores:
        """Let a model translate, and compare its translations with the references."""
        for one in self.sentences:  # one that is too long is better found now than after hours
            check_prompt(one.name, one.prompt, model.backend, _NEW_TOKENS)

        def answer(some: slice) -> list[dict[str, Any]]:
            prompts = [one.prompt for one in self.sentences[some]]
            answers = model.generate_batch(prompts, max_new_tokens=_NEW_TOKENS, stop=("\n",))
            return [{"completion": text} for text in answers]

        return judge(self, journal.in_batches([one.name for one in self.sentences], batch, answer, progress))


def load_sentences(pair: str, data: Path | None, problems: int | None) -> Sentences:
    """Read a benchmark (`benchmarks/translation/EN-DE.src.EN` and `.ref.DE`) and solved examples from a data folder.

    Raises
    ------
    ConfigError
        When sacrebleu is not installed.
    CorpusError
        When a file is missing, or two have not as many lines.
    """
    if find_spec("sacrebleu") is None:
        raise ConfigError(
            f"translation:{pair} needs sacrebleu, which is not installed: pip install 'secateur[lm-eval]'"
        )
    source, target = pair.split("-")
    place = f"benchmarks/translation/{pair}"
    asked = _pairs(f"{place}.src.{source}", f"{place}.ref.{target}", pair, data)
    solved = _pairs(f"text/translation/train.{source}", f"text/translation/train.{target}", pair, data)
    before = "".join(f"{_line(source, one)} {other}\n" for one, other in solved[:SHOTS])
    fitting = [number for number, (one, other) in enumerate(asked) if one and other and len(one) <= _LONGEST]
    sentences = tuple(
        Sentence(f"{pair}/{number}", f"{_header(target)}{before}{_line(source, asked[number][0])}", asked[number][1])
        for number in drawn(fitting, problems, int)
    )
    return Sentences(pair, sentences, len(fitting), _meteor_version() if target == "en" else None)


def judge(loaded: Sentences, answers: Sequence[dict[str, Any]]) -> Scores:
    """Compare translations with references; each metric goes from 0 to 1."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    given = [str(one["completion"]).strip() for one in answers]
    wanted = [one.reference for one in loaded.sentences]
    chrf = CHRF()
    each = [chrf.sentence_score(one, [other]).score / 100 for one, other in zip(given, wanted, strict=True)]
    means = {"chrF of sentences": mean_share(each)}
    for name, metric in (("chrF", chrf), ("BLEU", BLEU())):
        means[name] = _corpus_share(metric, given, wanted)
    if loaded.meteor is not None:
        means["METEOR"] = mean_share(_meteor(given, wanted))
    values = {one.name: value for one, value in zip(loaded.sentences, each, strict=True)}
    return Scores("chrF of sentences", means, len(given), loaded.n_sentences, values)


def _corpus_share(metric: Any, given: Sequence[str], wanted: Sequence[str]) -> Share:
    """Return the score of all sentences together, with sacrebleu's interval from resampled sentences."""
    import numpy as np

    state = np.random.get_state()
    try:
        score = metric.corpus_score(given, [wanted], n_bootstrap=_RESAMPLES)
    finally:
        np.random.set_state(state)
    value, middle, reach = (float(one) / 100 for one in (score.score, score._mean, score._ci))
    return Share(value, max(0.0, middle - reach), min(1.0, middle + reach))


def _meteor_version() -> str | None:
    """Return what METEOR is computed with, or None without nltk or its WordNet."""
    if find_spec("nltk") is None:
        return None
    import nltk
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return f"nltk {nltk.__version__}, WordNet {wordnet.get_version()}"


def _meteor(given: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """Return each sentence's METEOR, of the words that sacrebleu's tokenizer 13a splits a text into."""
    from nltk.translate.meteor_score import meteor_score
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words: Any = Tokenizer13a()  # type: ignore[no-untyped-call]
    return [
        float(meteor_score([words(other).split()], words(one).split()))
        for one, other in zip(given, wanted, strict=True)
    ]


def _header(target: str) -> str:
    return f"Sentences, each translated into {_NAMES[target]}:\n"


def _line(source: str, text: str) -> str:
    return f"{_NAMES[source]}: {text}\nTranslation:"


def _pairs(source: str, target: str, pair: str, data: Path | None) -> list[tuple[str, str]]:
    folder = data_folder(data)
    texts = []
    for name in (source, target):
        places = [] if folder is None else [folder / name, folder / f"{name}.gz"]
        found = next((path for path in places if path.is_file()), None)
        if found is None:
            raise CorpusError(
                f"no sentences of translation:{pair} were found: put {name} into a folder that --data or "
                "SECATEUR_DATA names"
            )
        texts.append(list(_lines(found)))
    if len(texts[0]) != len(texts[1]):
        raise CorpusError(
            f"{source} has {len(texts[0])} lines and {target} {len(texts[1])}; each has to have its other"
        )
    return list(zip(*texts, strict=True))


def _lines(path: Path) -> Iterator[str]:
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8: {error}") from error
    yield from (line.strip() for line in text.removesuffix("\n").split("\n"))
