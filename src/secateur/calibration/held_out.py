"""Windows of held-out text, on which perplexity is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.calibration.corpora import DOMAINS, domain_key, load_corpus
from secateur.calibration.documents import HELD_OUT
from secateur.calibration.spans import Span, Tokenizer, begin_tokens, encode_start, read_spans
from secateur.errors import ConfigError, CorpusError

SEED = 0  # fixed, so that figures measured on different days are of the same windows


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of one held-out file.

    `token_ids` is int64 [length], from BOS on if the tokenizer uses one. The first token is context, the others are
    predicted: `n_bytes` counts the UTF-8 bytes of their text, for bits per byte. `text` is that of all tokens but BOS.
    """

    document: str
    token_ids: NDArray[np.int64]
    n_bytes: int
    text: str = ""


def held_out_windows(
    domain: str,
    tokenizer: Tokenizer,
    *,
    max_tokens: int = 8000,
    window_length: int = 512,
    windows_per_document: int = 2,
    data: Path | None = None,
) -> list[Window]:
    """Return windows of a domain's held-out files, the same ones for every model with this tokenizer.

    Parameters
    ----------
    domain, data
        As for `load_corpus`. `code` gives each of its languages an equal part of `max_tokens`.
    max_tokens, window_length
        At most so many tokens in all, and in one window; BOS counts.
    windows_per_document
        At most so many windows of one file, which do not overlap; a second one only after each file gave its first.

    Raises
    ------
    ConfigError
        For a limit that leaves nothing to predict.
    CorpusError, UnknownNameError
        As `load_corpus`.
    """
    parts = DOMAINS.get(domain).parts if domain in DOMAINS else ()
    if parts:
        options = {"window_length": window_length, "windows_per_document": windows_per_document}
        share = max_tokens // len(parts)
        return [w for part in parts for w in held_out_windows(part, tokenizer, max_tokens=share, data=data, **options)]
    begin = begin_tokens(tokenizer)
    length = min(window_length, max_tokens)
    if length < 2 or windows_per_document < 1:
        raise ConfigError(
            f"held-out windows of {length} tokens, {windows_per_document} of a file, predict nothing: raise the limits"
        )
    corpus = load_corpus(domain, HELD_OUT, data)
    spans = read_spans(
        corpus.documents,
        tokenizer,
        limit=length - len(begin),
        seed=SEED,
        key=domain_key(domain),
        rounds=windows_per_document,
    )
    windows: list[Window] = []
    total = 0
    for span in spans:
        room = max_tokens - total - len(begin)
        if len(begin) + room < 2:
            break
        fitted = span if len(span.token_ids) <= room else _first_tokens(span, tokenizer, room)
        window = _window(fitted, tokenizer, begin)
        if len(window.token_ids) >= 2:
            total += len(window.token_ids)
            windows.append(window)
    if not windows:
        raise CorpusError(f"the held-out text of domain {domain!r} is too short to predict anything: add text")
    return windows


def in_other_tokens(windows: Sequence[Window], tokenizer: Tokenizer) -> list[Window]:
    """Return windows of the same text in the tokens of another tokenizer; those that predict nothing then are gone."""
    begin, found = begin_tokens(tokenizer), []
    for window in windows:
        token_ids = [int(token) for token in tokenizer(window.text, add_special_tokens=False).input_ids]
        found.append(_window(Span(window.document, window.text, token_ids), tokenizer, begin))
    return [window for window in found if len(window.token_ids) >= 2]


def _window(span: Span, tokenizer: Tokenizer, begin: list[int]) -> Window:
    token_ids = np.array([*begin, *span.token_ids], dtype=np.int64)
    n_bytes = _predicted_bytes(span, tokenizer, has_begin=bool(begin)) if len(token_ids) >= 2 else 0
    return Window(span.document, token_ids, n_bytes, span.text)


def _first_tokens(span: Span, tokenizer: Tokenizer, limit: int) -> Span:
    return Span(span.document, *encode_start(tokenizer, span.text, limit))


def _predicted_bytes(span: Span, tokenizer: Tokenizer, *, has_begin: bool) -> int:
    whole = len(span.text.encode())
    if has_begin:
        return whole
    first: Any
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(span.text, add_special_tokens=False, return_offsets_mapping=True)
        first = span.text[: encoded.offset_mapping[0][1]]
    else:
        first = tokenizer.decode(span.token_ids[:1])
    return whole - len(first.encode())
