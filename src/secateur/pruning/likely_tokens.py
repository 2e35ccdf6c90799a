"""Probabilities among the tokens that matter: a large vocabulary's head costs much, and most of it is never likely."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LIKELIEST = 16384  # tokens of a larger vocabulary that are compared
_ROWS = 64  # positions whose probabilities are in float32 at a time


def compared(model: PreTrainedModel) -> int:
    """Return how many tokens of a model's vocabulary are compared: all of them where its head cannot be cut."""
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    return min(LIKELIEST, vocabulary) if type(model.get_output_embeddings()) is nn.Linear else vocabulary


def total_probabilities(logits: Tensor) -> Tensor:
    """Return the sum of the probabilities over the rows of [positions, vocabulary], float32 [vocabulary]."""
    total = torch.zeros(logits.shape[1], device=logits.device)
    for rows in torch.split(logits, _ROWS):
        total += rows.float().softmax(-1).sum(0)
    return total


def likeliest(model: PreTrainedModel, total: Tensor) -> Tensor:
    """Return the tokens with the largest totals that are compared, ascending."""
    return total.topk(compared(model)).indices.sort().values


@contextmanager
def with_tokens(model: PreTrainedModel, tokens: Tensor) -> Iterator[None]:
    """While it is open a head computes the logits of these tokens only, in their order; what it is tied to stays."""
    head = model.get_output_embeddings()
    cut = type(head) is nn.Linear and len(tokens) < len(head.weight)
    whole = dict(head.named_parameters(recurse=False)) if cut else {}
    try:
        for name, parameter in whole.items():
            setattr(head, name, nn.Parameter(parameter.data[tokens], requires_grad=False))
        yield
    finally:
        for name, parameter in whole.items():
            setattr(head, name, parameter)
