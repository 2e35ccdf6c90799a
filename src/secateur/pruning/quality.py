"""The quality that a sub-model keeps: how likely it finds text, beside its parent.

Quality is the mean log-likelihood of a token of text that the sub-model was not derived from: a sub-model keeps 0.95
where the parent's is 0.95 times its own (both are below 0). That text is from the same domains and other than what
`secateur evaluate` measures on.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from secateur.calibration.packing import unseen_sequences
from secateur.calibration.spans import Tokenizer
from secateur.checkpoint.opened import open_submodel
from secateur.checkpoint.shards import read_shard
from secateur.errors import ConfigError, CorpusError, ModelError
from secateur.models.likelihood import token_log_likelihood
from secateur.pruning.base import Base
from secateur.pruning.prices import round_embedding
from secateur.pruning.texts import Texts
from secateur.resources import release_freed_memory

SAMPLES = 32  # sequences that quality is measured on


class Judge:
    """Measures models on token ids [sequences, length]; `progress` is called with those that are done, and all."""

    def __init__(
        self, base: Base, token_ids: NDArray[np.int64], device: torch.device, progress: Callable[[int, int], None]
    ) -> None:
        self._base, self._token_ids, self._device = base, torch.from_numpy(token_ids), device
        self._progress = progress

    def parent(self) -> float:
        """Return the nats per token of the base model."""
        return self._nats(self._base.tensors(self._device))

    def small_embedding(self) -> float:
        """Return the nats per token of the base model when its embedding and head have four bits."""
        return self._nats_of(round_embedding(self._base.loaded(self._base.tensors(self._device))))

    def submodel(self, folder: Path) -> float:
        """Return the nats per token of a sub-model, with its values as they are stored."""
        opened, dtype = open_submodel(folder), self._base.computing_dtype()
        tensors: dict[str, Tensor] = {}
        for shard in opened.shards:
            read = read_shard(folder / shard, opened.stored, dtype)
            tensors |= {name: one.to(self._device, dtype) for name, one in read.items()}
        return self._nats(tensors)

    def _nats(self, tensors: Mapping[str, Tensor]) -> float:
        return self._nats_of(self._base.loaded(tensors))

    def _nats_of(self, model: PreTrainedModel) -> float:
        total, sequences = 0.0, len(self._token_ids)
        for number, row in enumerate(self._token_ids):
            self._progress(number, sequences)
            total -= float(token_log_likelihood(model, row[None]).double().sum())
        self._progress(sequences, sequences)
        del model
        release_freed_memory()
        if not math.isfinite(total):
            raise ModelError("a likelihood is not finite; the weights overflow in their precision or are damaged")
        return total / (sequences * (self._token_ids.shape[1] - 1))


def unseen_text(texts: Texts, tokenizer: Tokenizer, data: Path | None) -> NDArray[np.int64]:
    """Return sequences of the same domains that are in none of some texts, int64 [SAMPLES, length].

    Raises
    ------
    CorpusError
        When there is no more text.
    ConfigError
        When what is found is not what the texts were drawn from.
    """
    calibration = texts.calibration
    try:
        found, provenance = unseen_sequences(
            calibration.mixture,
            tokenizer,
            seen=max(text.samples for text in (calibration, texts.recovery) if text is not None),
            samples=SAMPLES,
            sequence_length=calibration.sequence_length,
            seed=calibration.seed,
            data=data,
        )
    except CorpusError as error:
        raise CorpusError(f"{error} ({SAMPLES} of the samples here are those that quality is measured on)") from None
    if provenance != calibration.provenance:
        raise ConfigError(
            "the text that is found to measure quality is not that of the calibration set: name the data folder "
            "that it was drawn from"
        )
    return found


def allowed_loss(nats: float, quality: float) -> float:
    """Return how many nats per token a sub-model may lose that keeps `quality` of a parent with `nats` per token."""
    return nats * (1 / quality - 1)


def kept(nats: float, loss: float) -> float:
    """Return the quality that is kept with a loss, both in nats per token."""
    return nats / max(nats + loss, 1e-9)
