"""Which tokens a model for a domain needs most, for one that is to have fewer of them.

Tokens are ranked by how often they are to be expected: by the domain's own text, and for a tenth by Zipf's law over
the order of the vocabulary, for plain ASCII, because ids follow how frequent tokens were in the text that the tokenizer
was made from. Without that a name that one file repeats would win over words that happen not to be in the text.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.calibration.corpora import domain_key, load_corpus
from secateur.calibration.documents import HELD_OUT, TRAIN, Document, Provenance
from secateur.calibration.domain_tokens import chat_texts, encoded, indispensable, sample, vocabulary_texts
from secateur.calibration.mixture import Mixture
from secateur.errors import CorpusError, ModelError

LEFT_OUT = 5  # one document of so many
GENERAL = 0.1  # of a token that is expected, by the order of the vocabulary


@dataclass(frozen=True, eq=False)
class Ranking:
    """The tokens of a tokenizer, the most wanted first.

    Attributes
    ----------
    needed
        Tokens without which not every text could be written, or the model's config would name none; ascending.
    others
        int64, all other tokens, in the order in which they are wanted.
    provenance
        Of the text that was read.
    """

    needed: tuple[int, ...]
    others: NDArray[np.int64]
    provenance: tuple[Provenance, ...]


def rank_tokens(
    mixture: Mixture,
    tokenizer: Any,
    *,
    always: Iterable[int] = (),
    seed: int = 0,
    data: Path | None = None,
    leave_out: bool = False,
) -> Ranking:
    """Rank the tokens of a tokenizer for some domains.

    Parameters
    ----------
    mixture
        The domains and their weights.
    tokenizer
        A transformers tokenizer.
    always
        Further tokens that are needed, such as those that the model's config names.
    seed
        Decides which files are read of a domain with more characters than `domain_tokens.MAX_CHARACTERS`.
    data
        Data folder, as for `load_corpus`.
    leave_out
        Leave one document in five out, for `expected_tokens` to count.

    Raises
    ------
    CorpusError
        When a corpus cannot be found.
    ModelError
        When the tokenizer knows no token of it.
    """
    words = vocabulary_texts(tokenizer)
    expected = np.zeros(max(words, default=-1) + 1)
    corpora = {domain: load_corpus(domain, TRAIN, data) for domain, _ in mixture}
    for domain, weight in mixture:
        counts = np.zeros_like(expected)
        documents: Sequence[Document] = corpora[domain].documents
        if leave_out:
            documents = [one for number, one in enumerate(documents) if number % LEFT_OUT]
        for token_ids in encoded(sample(documents, seed, domain_key(domain)), tokenizer):
            np.add.at(counts, token_ids, 1)
        expected += (1 - GENERAL) * weight * counts / max(1.0, counts.sum())
    if not expected.any():  # transformers makes an empty tokenizer where a model has none
        raise ModelError("the model's tokenizer finds no token in the text: put a tokenizer.json beside its weights")
    plain = np.array(sorted(index for index, text in words.items() if text.isascii()), dtype=np.int64)
    zipf = 1 / (np.arange(len(plain)) + 1)
    expected[plain] += GENERAL * zipf / zipf.sum()
    spoken = {token for token_ids in encoded(chat_texts(tokenizer), tokenizer) for token in token_ids}
    needed = {token for token in (*indispensable(tokenizer, words), *always, *spoken) if token >= 0}
    order = np.argsort(-expected, kind="stable")
    known = np.isin(order, list(words.keys() - needed))
    provenance = tuple(entry for corpus in corpora.values() for entry in corpus.provenance)
    return Ranking(tuple(sorted(needed)), order[known], provenance)


def expected_tokens(mixture: Mixture, tokenizer: Any, *, seed: int = 0, data: Path | None = None) -> dict[int, float]:
    """Return the share of each token in the training documents that `rank_tokens` has left out, by its id.

    Raises
    ------
    CorpusError
        When a corpus cannot be found, or has fewer documents than one in five can be left out of.
    """
    shares: dict[int, float] = {}
    for domain, weight in mixture:
        documents = load_corpus(domain, TRAIN, data).documents
        if len(documents) < LEFT_OUT:
            raise CorpusError(f"{domain} has too few documents to tell how many tokens it needs: give --vocabulary")
        counts: Counter[int] = Counter()
        for token_ids in encoded(sample(documents[::LEFT_OUT], seed, domain_key(domain)), tokenizer):
            counts.update(token_ids)
        for token, count in counts.items():
            shares[token] = shares.get(token, 0.0) + weight * count / counts.total()
    return shares


def more_tokens(
    mixture: Mixture, tokenizer: Any, smaller: Any, *, seed: int = 0, data: Path | None = None
) -> dict[str, float | None]:
    """Return for each domain by which share its held-out text takes more tokens; None where there is no such text."""
    found: dict[str, float | None] = {}
    for domain, _ in mixture:
        try:
            texts = list(sample(load_corpus(domain, HELD_OUT, data).documents, seed, domain_key(domain)))
        except CorpusError:  # a folder of one file has no other one to hold out
            found[domain] = None
            continue
        before, after = (sum(len(ids) for ids in encoded(texts, one)) for one in (tokenizer, smaller))
        found[domain] = round(after / before - 1, 6) if before else None
    return found
