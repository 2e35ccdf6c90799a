"""Perplexity of held-out text, and by how much two models differ on the same documents.

The first token of a window has nothing before it and is not predicted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from secateur.errors import CorpusError, ModelError
from secateur.evaluation.statistics import Difference, ratio, ratio_difference
from secateur.resources import release_freed_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from secateur.calibration.held_out import Window

WIDTH = 64
BATCH = 4  # windows in one pass: enough to fill a CPU, little beside the weights


@dataclass(frozen=True)
class DocumentLoss:
    """What one document adds to the sums.

    Attributes
    ----------
    document
        Name of the document in its corpus.
    nats
        Negative log-likelihood of the predicted tokens, natural logarithm.
    tokens
        Number of predicted tokens.
    n_bytes
        Bytes of UTF-8 text of the predicted tokens.
    """

    document: str
    nats: float
    tokens: int
    n_bytes: int


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one domain.

    Attributes
    ----------
    domain
        Name of the domain.
    documents
        One entry for each document, in the order of the windows.
    perplexity
        exp(nats / tokens).
    standard_error
        Of ln(perplexity), over documents; None with fewer than two documents.
    bits_per_byte
        nats / ln(2) / bytes; comparable between tokenizers.
    """

    domain: str
    documents: tuple[DocumentLoss, ...]
    perplexity: float
    standard_error: float | None
    bits_per_byte: float

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return len(self.documents)

    @property
    def n_tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(document.tokens for document in self.documents)

    @property
    def n_bytes(self) -> int:
        """Bytes of text of the predicted tokens."""
        return sum(document.n_bytes for document in self.documents)


@dataclass(frozen=True)
class PerplexityComparison:
    """A model beside the one it came from, on the documents that both were measured on.

    Attributes
    ----------
    against
        Name of the other model.
    comparable
        Whether both split the text into the same tokens of the same vocabulary. Where they do not, perplexities are
        about different things: only `bits_per_byte` may be compared, and the fields of perplexity are None.
    n_documents
        Number of documents in common.
    ln_perplexity
        ln(perplexity) minus that of the other; above 0 is worse.
    ratio, ratio_low, ratio_high
        Perplexity over that of the other, and its 95% interval.
    bits_per_byte
        Bits per byte minus that of the other; above 0 is worse.
    """

    against: str
    comparable: bool
    n_documents: int
    ln_perplexity: Difference | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    bits_per_byte: Difference


def evaluate_perplexity(
    model: "PreTrainedModel",
    windows: "Sequence[Window]",
    domain: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Measure a model on windows of held-out text.

    Parameters
    ----------
    model
        In evaluation mode.
    windows
        Token ids of the model's own tokenizer; windows of one document count as one cluster.
    domain
        Name for the result.
    progress
        Called with the number of windows done and their total.

    Raises
    ------
    CorpusError
        When no window has a token to predict.
    ModelError
        When the model gives a likelihood that is not finite.
    """
    windows = [window for window in windows if len(window.token_ids) > 1]
    if not windows:
        raise CorpusError(f"the held-out text of {domain} has no token to predict; give more text")
    nats = _window_nats(model, windows, domain, progress)
    sums: dict[str, tuple[float, int, int]] = {}
    for window, loss in zip(windows, nats, strict=True):
        before = sums.get(window.document, (0.0, 0, 0))
        predicted = len(window.token_ids) - 1
        sums[window.document] = (before[0] + loss, before[1] + predicted, before[2] + window.n_bytes)
    return summarise(domain, [DocumentLoss(document, *entry) for document, entry in sums.items()])


def summarise(domain: str, documents: Sequence[DocumentLoss]) -> PerplexityResult:
    """Return the figures that follow from sums over documents."""
    nats = [document.nats for document in documents]
    value, error = ratio(nats, [document.tokens for document in documents])
    per_byte, _ = ratio(nats, [document.n_bytes for document in documents])
    return PerplexityResult(domain, tuple(documents), _exp(value), error, per_byte / math.log(2))


def compare_perplexity(
    result: PerplexityResult, other: PerplexityResult, against: str, *, comparable: bool
) -> PerplexityComparison:
    """Compare two results over the documents that both have.

    Parameters
    ----------
    result, other
        Of the model and of the one it is compared with.
    against
        Name of the latter.
    comparable
        Whether both models were given the same tokens.

    Raises
    ------
    CorpusError
        When no document is common to both.
    """
    theirs = {document.document: document for document in other.documents}
    pairs = [(mine, theirs[mine.document]) for mine in result.documents if mine.document in theirs]
    if not pairs:
        raise CorpusError(f"no document of {result.domain} was measured on both models; raise the token limit")
    bits = 1 / math.log(2)
    per_byte = ratio_difference(
        [mine.nats * bits for mine, _ in pairs],
        [mine.n_bytes for mine, _ in pairs],
        [their.nats * bits for _, their in pairs],
        [their.n_bytes for _, their in pairs],
    )
    if not comparable:
        return PerplexityComparison(against, False, len(pairs), None, None, None, None, per_byte)
    difference = ratio_difference(
        [mine.nats for mine, _ in pairs],
        [mine.tokens for mine, _ in pairs],
        [their.nats for _, their in pairs],
        [their.tokens for _, their in pairs],
    )
    low, high = (None if end is None else _exp(end) for end in (difference.low, difference.high))
    return PerplexityComparison(against, True, len(pairs), difference, _exp(difference.value), low, high, per_byte)


def _window_nats(
    model: "PreTrainedModel",
    windows: "Sequence[Window]",
    domain: str,
    progress: Callable[[int, int], None] | None,
) -> list[float]:
    """Return the negative log-likelihood of each window.

    Windows go through the model in batches of like length, filled up behind their ends: under causal attention no
    token sees what comes after it, so what is filled in changes nothing before it.
    """
    import torch

    from secateur.models.likelihood import token_log_likelihood

    nats = [math.nan] * len(windows)
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].token_ids))
    longest = len(windows[order[0]].token_ids)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        rows = _stacked([windows[index].token_ids for index in batch], longest)
        losses = token_log_likelihood(model, torch.from_numpy(rows))
        for row, index in enumerate(batch):
            loss = -float(losses[row, : len(windows[index].token_ids) - 1].double().sum())
            if not math.isfinite(loss):
                raise ModelError(
                    f"the model gives a likelihood that is not finite ({loss}) on {windows[index].document!r} of "
                    f"{domain}; its weights are damaged or overflow in their precision"
                )
            nats[index] = loss
        release_freed_memory()
        if progress is not None:
            progress(start + len(batch), len(windows))
    return nats


def _stacked(rows: "list[NDArray[np.int64]]", longest: int) -> "NDArray[np.int64]":
    """Return rows of several lengths as one array, each filled up with its own last token.

    The width is a multiple of 64 or `longest`: few widths mean few kernels to prepare, and memory that is used again.
    """
    width = min(longest, -(-max(map(len, rows)) // WIDTH) * WIDTH)
    return np.stack([np.pad(row, (0, width - len(row)), mode="edge") for row in rows])


def _exp(value: float) -> float:
    """Return e^value, infinite where a float cannot hold it: a ruined model may be that surprised."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
