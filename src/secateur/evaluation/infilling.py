"""Fill-in-the-middle: a line, or a stretch of code, is taken out of a held-out file, and the model is to put it back.

Nothing is run. What is told is how many answers are the very text that was there (the exact match, white space at its
ends aside), and how much of it they are: 1 less the Levenshtein distance over the length of the longer text.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.evaluation.folder import hash_of
from secateur.evaluation.journal import Journal
from secateur.evaluation.proportions import mean_share
from secateur.evaluation.scores import Scores
from secateur.runtime.loaded import LoadedModel

Kind = Literal["line", "span"]
EACH = 100  # gaps of each kind
_BEFORE, _AFTER = 3000, 1500  # characters of a file that a model sees on both sides of a gap
_SHORTEST, _LONGEST = 8, 200  # characters of a gap
_LINES = 3  # that a stretch goes over, at most
_NEW_TOKENS = 96
_SEED = 0


@dataclass(frozen=True)
class Gap:
    """A place in a file from which text was taken.

    Attributes
    ----------
    name
        The file, and the kind.
    kind
        A `line` without its indentation, or a `span` that begins in a line and ends where a line does.
    before, after
        What stands on both sides.
    text
        What was taken.
    """

    name: str
    kind: Kind
    before: str
    after: str
    text: str

    def cut(self, answer: str) -> str:
        """Return as much of an answer as counts: of a line the first that is not empty."""
        if self.kind == "span":
            return answer
        return answer.lstrip("\n").partition("\n")[0]


def gaps(domain: str, data: Path | None, count: int = EACH) -> list[Gap]:
    """Return gaps in held-out files of a domain, `count` of each kind, at most one of a kind for each file.

    Which ones depends on the files alone. Raises what `load_corpus` does.
    """
    from secateur.calibration.corpora import load_corpus
    from secateur.calibration.documents import HELD_OUT

    documents = sorted(load_corpus(domain, HELD_OUT, data).documents, key=lambda one: _order(one.name))
    found: list[Gap] = []
    for kind in ("line", "span"):
        made: list[Gap] = []
        for document in documents:
            gap = _gap(document.name, document.text, kind)
            made += [gap] if gap is not None else []
            if len(made) == count:
                break
        found += made
    return found


def _order(name: str) -> str:
    return hashlib.sha256(f"{_SEED}\0{name}".encode("utf-8", "surrogatepass")).hexdigest()


def _gap(name: str, text: str, kind: Kind) -> Gap | None:
    """Return a gap in a text, or None when it has no line that is long enough."""
    chance = random.Random(_order(f"{kind}\0{name}"))  # noqa: S311 - repeatable is what it has to be
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    fitting = [number for number in range(1, len(lines)) if _SHORTEST <= len(lines[number].strip()) <= _LONGEST]
    if not fitting:
        return None
    number = chance.choice(fitting)
    begin = starts[number] + len(lines[number]) - len(lines[number].lstrip())
    end = starts[number] + len(lines[number].rstrip())
    if kind == "span":
        begin += chance.randrange(len(lines[number].strip()) // 2)
        last = min(number + chance.randrange(_LINES), len(lines) - 1)
        ends = [starts[one] + len(lines[one].rstrip()) for one in range(number, last + 1)]
        end = max((one for one in ends if one - begin <= _LONGEST), default=end)
        end = begin + len(text[begin:end].rstrip())
    before = text[:begin][-_BEFORE:]
    if begin > _BEFORE:  # from the begin of a line on
        before = before.partition("\n")[2]
    return Gap(f"{name}, {kind}", kind, before, text[end : end + _AFTER], text[begin:end])


@dataclass(frozen=True)
class Gaps:
    """Gaps that a model is to fill; see `secateur.evaluation.asked.Answered`."""

    gaps: tuple[Gap, ...]

    @property
    def sha256(self) -> str:
        """Return a SHA-256 of what is asked and what was there."""
        parts = (part for gap in self.gaps for part in (gap.name, gap.before, gap.after, gap.text))
        return hash_of(*parts)

    def described(self) -> dict[str, Any]:
        """Return what results depend on."""
        return {"sha256": self.sha256, "problems": len(self.gaps)}

    def ask(self, model: LoadedModel, journal: Journal, progress: Callable[[int, int], None], batch: int) -> Scores:
        """Let a model fill the gaps, and compare its answers with what was there."""

        def answer(some: slice) -> list[dict[str, Any]]:
            part = self.gaps[some]
            before, after = [gap.before for gap in part], [gap.after for gap in part]
            answers = model.generate_batch(before, max_new_tokens=_NEW_TOKENS, suffixes=after)
            return [{"completion": text} for text in answers]

        names = [gap.name for gap in self.gaps]
        return judge(self.gaps, journal.in_batches(names, batch, answer, progress))


def judge(some: Sequence[Gap], answers: Sequence[dict[str, Any]]) -> Scores:
    """Compare answers with what was there; models are compared by exact matches."""
    exact, alike = {}, []
    for gap, answer in zip(some, answers, strict=True):
        given = gap.cut(answer["completion"]).strip()
        exact[gap.name] = float(given == gap.text.strip())
        alike.append(similarity(given, gap.text.strip()))
    means = {"exact match": mean_share(list(exact.values())), "similarity": mean_share(alike)}
    return Scores("exact match", means, len(some), len(some), exact)


def similarity(one: str, other: str) -> float:
    """Return 1 less the Levenshtein distance of two texts over the length of the longer one."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(one, other))
