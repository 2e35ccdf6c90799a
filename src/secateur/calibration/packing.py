"""From a mixture of domains to a packed calibration set: sequences without padding, each domain by its tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.calibration.corpora import domain_key, load_corpus
from secateur.calibration.documents import TRAIN, Corpus, Provenance
from secateur.calibration.mixture import Mixture, apportion, normalise_mixture
from secateur.calibration.spans import Tokenizer, begin_tokens, random_numbers, read_spans
from secateur.errors import ConfigError, CorpusError


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Packed token ids and where they came from.

    `token_ids` is int64 [samples, sequence_length]; `mixture` holds the domains with weights by tokens that sum to 1,
    `code` written as its languages; `sha256` covers the shape and the token ids.
    """

    token_ids: NDArray[np.int64]
    seed: int
    mixture: Mixture
    provenance: tuple[Provenance, ...]
    sha256: str

    @property
    def samples(self) -> int:
        """Number of sequences."""
        return int(self.token_ids.shape[0])

    @property
    def sequence_length(self) -> int:
        """Tokens in each sequence."""
        return int(self.token_ids.shape[1])


def build_calibration_set(
    mixture: Sequence[tuple[str, float]],
    tokenizer: Tokenizer,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    data: Path | None = None,
) -> CalibrationSet:
    """Draw a calibration set from the train split of the domains of a mixture.

    Parameters
    ----------
    mixture
        (domain, weight) pairs, as from `parse_mixture`; weights need not sum to 1.
    tokenizer
        A transformers tokenizer. If it puts BOS before a text, each sequence begins with BOS. Spans of documents are
        joined with EOS; with the tokens of a newline where a tokenizer has no EOS.
    samples, sequence_length
        Shape of the set, in sequences and tokens; BOS counts as a token of a sequence.
    seed
        0 or more. Equal seeds give equal bytes on any machine that has the same corpora. What is drawn from a domain
        depends on no other domain, but for how much: neither does the order of the mixture matter.
    data
        Data folder, as for `load_corpus`.

    Returns
    -------
    CalibrationSet
        The domains' streams, packed one after the other, with the sequences in a seeded order, so that a set's first
        rows are a sample of all. All tokens but BOS are shared out exactly by weight (largest remainder).

    Raises
    ------
    ConfigError
        For a shape or a seed that cannot be, a bad mixture, and a weight so small that it gives no token.
    CorpusError
        When a corpus cannot be found, or has fewer tokens than its share.
    """
    begin = begin_tokens(tokenizer)
    if samples < 1 or sequence_length <= len(begin):
        raise ConfigError(
            f"a calibration set of {samples} sequences of {sequence_length} tokens: both have to be positive"
        )
    mixture = normalise_mixture(mixture)
    width = sequence_length - len(begin)
    shares = sorted(((domain_key(domain), weight, domain) for domain, weight in mixture), key=lambda share: share[::2])
    wanted = apportion(samples * width, [(key, weight) for key, weight, _ in shares])
    corpora = {domain: load_corpus(domain, TRAIN, data) for domain, _ in mixture}
    stream: list[int] = []
    for (key, weight, domain), count in zip(shares, wanted, strict=True):
        if count == 0:
            raise ConfigError(
                f"the weight {weight:.3g} of domain {domain!r} gives none of {samples * width} tokens: raise it"
            )
        stream += _stream(corpora[domain], tokenizer, count=count, limit=width, seed=seed, key=key)
    rows = np.array(stream, dtype=np.int64).reshape(samples, width)
    draws = random_numbers(seed, "order of the sequences", samples)
    rows = rows[sorted(range(samples), key=draws.__getitem__)]
    token_ids = np.hstack([np.full((samples, len(begin)), begin or 0, dtype=np.int64), rows])
    provenance = tuple(entry for domain, _ in mixture for entry in corpora[domain].provenance)
    return CalibrationSet(token_ids, seed, mixture, provenance, token_ids_hash(token_ids))


def token_ids_hash(token_ids: NDArray[np.int64]) -> str:
    """Return the SHA-256 over "ROWSxCOLUMNS\\n" and the ids as little-endian int64, row by row."""
    rows, columns = token_ids.shape
    return hashlib.sha256(f"{rows}x{columns}\n".encode() + token_ids.astype("<i8").tobytes()).hexdigest()


def _stream(corpus: Corpus, tokenizer: Tokenizer, *, count: int, limit: int, seed: int, key: str) -> list[int]:
    """Return exactly `count` tokens of a corpus, spans joined with EOS."""
    end = tokenizer.eos_token_id
    joint = [end] if end is not None else list(tokenizer("\n", add_special_tokens=False).input_ids)
    stream: list[int] = []
    for span in read_spans(corpus.documents, tokenizer, limit=limit, seed=seed, key=key):
        stream += [*span.token_ids, *joint]
        if len(stream) >= count:
            return stream[:count]
    raise CorpusError(
        f"the corpus of domain {corpus.domain!r} ({corpus.provenance[0].source}) has {len(stream)} tokens and"
        f" {count} are wanted: take fewer samples, shorter sequences, or more text"
    )
