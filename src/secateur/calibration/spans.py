"""Reading a corpus span by span: seeded, without tokenising more of it than is used, and nothing twice."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from secateur.calibration.documents import Document
from secateur.errors import ConfigError

CHARACTERS_PER_TOKEN = 8  # source code has three to four in a token: twice that nearly always suffices


class Tokenizer(Protocol):
    """What this package needs of a transformers tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...  # noqa: D102

    @property
    def eos_token_id(self) -> int | None: ...  # noqa: D102

    def __call__(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> Any: ...  # noqa: D102

    def decode(self, token_ids: Any) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Span:
    """Consecutive text of one document and exactly its tokens."""

    document: str
    text: str
    token_ids: list[int]


def random_numbers(seed: int, key: str, count: int) -> list[int]:
    """Return 64-bit numbers that depend on seed and key alone.

    Raw output of PCG64, because NumPy promises the same bits in every version only for that, not for `permutation`.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}: it has to be 0 or more")
    stream = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return [int(number) for number in np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(count)]


def read_spans(
    documents: Sequence[Document], tokenizer: Tokenizer, *, limit: int, seed: int, key: str, rounds: int | None = None
) -> Iterator[Span]:
    """Yield spans of up to `limit` tokens, one of each document in a seeded order, then a second of each, and so on.

    A document is read as a ring: from a seeded random line to its end, then from its beginning to that line. A span
    ends at a line's end unless the line is long. It ends after `rounds` rounds, or when all text was yielded once.
    """
    draws = random_numbers(seed, key, 2 * len(documents))
    order = sorted(range(len(documents)), key=draws.__getitem__)
    rings = [(documents[i].name, _ring(documents[i].text, draws[len(documents) + i])) for i in order]
    done = 0
    while rings and (rounds is None or done < rounds):
        done += 1
        left = []
        for name, (text, *others) in rings:
            piece, token_ids = encode_start(tokenizer, text, limit)
            if token_ids:
                yield Span(name, piece, token_ids)
            rest = [part for part in (text[len(piece) :], *others) if part]
            if rest:
                left.append((name, rest))
        rings = left


def encode_start(tokenizer: Tokenizer, text: str, limit: int) -> tuple[str, list[int]]:
    """Return as much of a text's start as fits into `limit` tokens (nearly), and its tokens, without special ones."""
    piece = _cut(text, CHARACTERS_PER_TOKEN * limit)
    while True:
        with no_length_warning():
            token_ids = [int(token) for token in tokenizer(piece, add_special_tokens=False).input_ids]
        if len(token_ids) <= limit or len(piece) == 1:
            return piece, token_ids[:limit]
        piece = _cut(piece, max(1, len(piece) * limit // len(token_ids)))


def begin_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return [BOS] if the tokenizer itself puts it before a text, else []."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and list(tokenizer("x").input_ids)[:1] == [begin] else []


def _ring(text: str, draw: int) -> list[str]:
    line = draw % (text.rstrip("\n").count("\n") + 1)
    start = len(text) - len(text.split("\n", line)[line])
    return [part for part in (text[start:], text[:start]) if part]


def _cut(text: str, characters: int) -> str:
    """Shorten to at most so many characters, at a line's end if there is one in the second half."""
    if len(text) <= characters:
        return text
    end = text.rfind("\n", 0, characters) + 1
    return text[: end if end > characters // 2 else characters]


@contextmanager
def no_length_warning() -> Iterator[None]:
    """Silence transformers' warning that a text is longer than the model's context: it is cut afterwards."""
    logger = logging.getLogger("transformers.tokenization_utils_base")

    def other(record: logging.LogRecord) -> bool:
        return "sequence length is longer" not in str(record.msg)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
