"""From a mixture of domains to a packed calibration set: sequences without padding, each domain by its tokens."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.calibration.benchmark_runs import Overlap, count_overlaps
from secateur.calibration.corpora import domain_key, load_corpus
from secateur.calibration.documents import TRAIN, Corpus, Provenance
from secateur.calibration.mixture import Mixture, apportion, normalise_mixture
from secateur.calibration.spans import Tokenizer, begin_tokens, random_numbers, read_spans
from secateur.errors import ConfigError, CorpusError


class TooLittleTextError(CorpusError):
    """A corpus that has fewer tokens than its share of a set."""


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Packed token ids and where they came from.

    `token_ids` is int64 [samples, sequence_length]; `mixture` holds the domains with weights by tokens that sum to 1,
    `code` written as its languages; `sha256` covers the shape and the token ids. `benchmarks` says what the text has of
    each known benchmark (`benchmark_runs`).
    """

    token_ids: NDArray[np.int64]
    seed: int
    mixture: Mixture
    provenance: tuple[Provenance, ...]
    sha256: str
    benchmarks: Mapping[str, Overlap]

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
        Sequences in a seeded order, so that a set's first rows are a sample of all. Each begins at the beginning of a
        line (but for those that domains share, and the last of a corpus that is used up), as the texts do that a model
        is given: what a model does with the first token of a context it does with no other (the attention sink of
        arXiv 2309.17453), and weights that only this needs are seen only there. All tokens but BOS are shared out
        exactly by weight (largest remainder).

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
    mixture, width = normalise_mixture(mixture), sequence_length - len(begin)
    shares, corpora, provenance = _sources(mixture, data)
    wanted = apportion(samples * width, [(key, weight) for key, weight, _ in shares])
    rows: list[list[int]] = []
    remainders: list[int] = []
    for (key, weight, domain), count in zip(shares, wanted, strict=True):
        if count == 0:
            raise ConfigError(
                f"the weight {weight:.3g} of domain {domain!r} gives none of {samples * width} tokens: raise it"
            )
        whole, remainder = _pack(corpora[domain], tokenizer, count=count, width=width, seed=seed, key=key)
        rows += whole
        remainders += remainder
    rows += [remainders[start : start + width] for start in range(0, len(remainders), width)]
    draws = random_numbers(seed, "order of the sequences", samples)
    order = sorted(range(samples), key=draws.__getitem__)
    token_ids = np.array([[*begin, *rows[index]] for index in order], dtype=np.int64)
    benchmarks = count_overlaps(tokenizer.decode(row) for row in token_ids.tolist())
    return CalibrationSet(token_ids, seed, mixture, provenance, token_ids_hash(token_ids), benchmarks)


def unseen_sequences(
    mixture: Sequence[tuple[str, float]],
    tokenizer: Tokenizer,
    *,
    seen: int,
    samples: int,
    sequence_length: int,
    seed: int,
    data: Path | None = None,
) -> tuple[NDArray[np.int64], tuple[Provenance, ...]]:
    """Return sequences of the text that follows what a calibration set has taken, and where it comes from.

    Parameters
    ----------
    mixture, tokenizer, sequence_length, seed, data
        Those of the calibration set.
    seen
        Its samples; of several sets, the most.
    samples
        How many sequences there are to be, shared out by weight; each is of one domain.

    Returns
    -------
    int64 [samples, sequence_length], and the provenance.

    Raises
    ------
    CorpusError
        When a corpus has not so much text.
    """
    begin = begin_tokens(tokenizer)
    mixture, width = normalise_mixture(mixture), sequence_length - len(begin)
    shares, corpora, provenance = _sources(mixture, data)
    weights = [(key, weight) for key, weight, _ in shares]
    taken, wanted = apportion(seen * width, weights), apportion(samples, weights)
    rows: list[list[int]] = []
    for (key, _, domain), count, more in zip(shares, taken, wanted, strict=True):
        if more:
            whole = (-(-count // width) + more) * width
            rows += _pack(corpora[domain], tokenizer, count=whole, width=width, seed=seed, key=key)[0][-more:]
    return np.array([[*begin, *row] for row in rows], dtype=np.int64), provenance


def _sources(
    mixture: Mixture, data: Path | None
) -> tuple[list[tuple[str, float, str]], dict[str, Corpus], tuple[Provenance, ...]]:
    """Return (key, weight, domain) in an order that the mixture's does not decide, the corpora, and whence they are."""
    shares = sorted(((domain_key(domain), weight, domain) for domain, weight in mixture), key=lambda share: share[::2])
    corpora = {domain: load_corpus(domain, TRAIN, data) for domain, _ in mixture}
    return shares, corpora, tuple(entry for domain, _ in mixture for entry in corpora[domain].provenance)


def token_ids_hash(token_ids: NDArray[np.int64]) -> str:
    """Return the SHA-256 over "ROWSxCOLUMNS\\n" and the ids as little-endian int64, row by row."""
    rows, columns = token_ids.shape
    return hashlib.sha256(f"{rows}x{columns}\n".encode() + token_ids.astype("<i8").tobytes()).hexdigest()


def _pack(
    corpus: Corpus, tokenizer: Tokenizer, *, count: int, width: int, seed: int, key: str
) -> tuple[list[list[int]], list[int]]:
    """Return `count` tokens of a corpus as whole rows and a remainder, spans joined with EOS.

    A row begins with a new span. What does not fit at its end goes on inside the next row, so that no text is lost.
    """
    end = tokenizer.eos_token_id
    joint = [end] if end is not None else list(tokenizer("\n", add_special_tokens=False).input_ids)
    spans = (span.token_ids for span in read_spans(corpus.documents, tokenizer, limit=width, seed=seed, key=key))
    rest: list[int] = []
    rows: list[list[int]] = []
    for start in range(0, count, width):
        room = min(width, count - start)
        row: list[int] = []
        while len(row) < room:
            piece = None if rest and row else next(spans, None)
            if piece is None:
                piece, rest = rest, []
            if not piece:
                raise TooLittleTextError(
                    f"the corpus of domain {corpus.domain!r} ({corpus.provenance[0].source}) has {start + len(row)} "
                    f"tokens and {count} are wanted: take fewer samples, shorter sequences, or more text"
                )
            fits, over = piece[: room - len(row)], piece[room - len(row) :]
            row += fits
            row += joint[: room - len(row)]
            rest = over + rest
        rows.append(row)
    remainder = rows.pop() if count % width else []
    return rows, remainder
