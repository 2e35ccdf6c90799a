"""The tokens that a sub-model of a domain is likely to write, for a head that computes no others.

Which tokens: those of the domain's own text, those without which a tokenizer cannot write any text at all, and, up to
a share of the vocabulary, the first ones of plain ASCII, because ids follow how frequent tokens were in the text that
the tokenizer was made from.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.calibration.corpora import domain_key, load_corpus
from secateur.calibration.documents import HELD_OUT, TRAIN, Provenance
from secateur.calibration.domain_tokens import chat_texts, encoded, indispensable, sample, vocabulary_texts
from secateur.calibration.mixture import Mixture
from secateur.errors import CorpusError, ModelError

# Covers 99.2% to 99.9% of the tokens of held-out files in four languages, where the text's own tokens cover 97.5% to
# 99.7%.
SHARE = 0.4


@dataclass(frozen=True, eq=False)
class TokenChoice:
    """The tokens of a shortlist and where they come from.

    Attributes
    ----------
    token_ids
        int32, strictly ascending.
    vocabulary
        Rows of the model's head, of which these are some.
    coverage
        For each domain the share of the tokens of its held-out text that are among them; None where there is none.
    provenance
        Of the text that was read.
    """

    token_ids: NDArray[np.int32]
    vocabulary: int
    coverage: dict[str, float | None]
    provenance: tuple[Provenance, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data that tells which tokens these are."""
        digest = hashlib.sha256(self.token_ids.astype("<i4").tobytes()).hexdigest()
        return {
            "tokens": len(self.token_ids),
            "vocabulary": self.vocabulary,
            "sha256": digest,
            "coverage": dict(self.coverage),
        }


def choose_tokens(
    mixture: Mixture,
    tokenizer: Any,
    vocabulary: int,
    *,
    always: Iterable[int] = (),
    seed: int = 0,
    data: Path | None = None,
) -> TokenChoice:
    """Choose the tokens of a trimmed head.

    Parameters
    ----------
    mixture
        The domains; their weights do not matter here.
    tokenizer
        A transformers tokenizer.
    vocabulary
        Rows of the model's head.
    always
        Further tokens that are wanted, such as those that the model's config names.
    seed
        Decides which files are read of a domain with more than `MAX_CHARACTERS`.
    data
        Data folder, as for `load_corpus`.

    Raises
    ------
    CorpusError
        When a corpus cannot be found.
    ModelError
        When the tokenizer knows no token of it.
    """
    used = np.zeros(vocabulary, dtype=np.bool_)
    corpora = {domain: load_corpus(domain, TRAIN, data) for domain, _ in mixture}
    for domain, corpus in corpora.items():
        for token_ids in encoded(sample(corpus.documents, seed, domain_key(domain)), tokenizer):
            _mark(used, token_ids)
    if not used.any():  # transformers makes an empty tokenizer where a model has none
        raise ModelError("the model's tokenizer finds no token in the text: put a tokenizer.json beside its weights")
    for token_ids in encoded(chat_texts(tokenizer), tokenizer):
        _mark(used, token_ids)
    words = vocabulary_texts(tokenizer)
    _mark(used, [*always, *indispensable(tokenizer, words)])
    room = max(0, int(SHARE * vocabulary) - int(used.sum()))
    plain = np.array(sorted(i for i, text in words.items() if i < vocabulary and text.isascii() and not used[i]), int)
    used[plain[:room]] = True
    coverage = {domain: _coverage(domain, tokenizer, used, seed, data) for domain, _ in mixture}
    provenance = tuple(entry for corpus in corpora.values() for entry in corpus.provenance)
    return TokenChoice(np.flatnonzero(used).astype(np.int32), vocabulary, coverage, provenance)


def _mark(used: NDArray[np.bool_], token_ids: Iterable[int]) -> None:
    found = np.fromiter(token_ids, dtype=np.int64)
    used[found[(found >= 0) & (found < len(used))]] = True  # a tokenizer may know more than the model has rows for


def _coverage(domain: str, tokenizer: Any, used: NDArray[np.bool_], seed: int, data: Path | None) -> float | None:
    try:
        held_out = load_corpus(domain, HELD_OUT, data)
    except CorpusError:  # a folder of one file has no other one to hold out
        return None
    covered = total = 0
    for token_ids in encoded(sample(held_out.documents, seed, domain_key(domain)), tokenizer):
        found = np.array(token_ids, dtype=np.int64)
        total += len(found)
        covered += int(used[found[found < len(used)]].sum())
    return round(covered / total, 6) if total else None
