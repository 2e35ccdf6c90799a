"""Probabilities among the tokens that matter: a large vocabulary's head costs much, and most of it is never likely."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LIKELIEST = 16384  # tokens that are compared: those that the parent gives most to
_ROWS = 64  # positions whose probabilities are in float32 at a time


def compared(vocabulary: int) -> int:
    """Return how many tokens of a vocabulary are compared."""
    return min(LIKELIEST, vocabulary)


def total_probabilities(logits: Tensor) -> Tensor:
    """Return the sum of the probabilities over the rows of [positions, vocabulary], float32 [vocabulary]."""
    total = torch.zeros(logits.shape[1], device=logits.device)
    for rows in torch.split(logits, _ROWS):
        total += rows.float().softmax(-1).sum(0)
    return total


def likeliest(model: PreTrainedModel, total: Tensor) -> Tensor:
    """Return the tokens with the largest totals, ascending; all of them where the head of a model cannot be cut."""
    if type(model.get_output_embeddings()) is not nn.Linear:
        return torch.arange(len(total), device=total.device)
    return total.topk(compared(len(total))).indices.sort().values


@contextmanager
def with_tokens(model: PreTrainedModel, tokens: Tensor) -> Iterator[None]:
    """While it is open a head computes the logits of these tokens only, in their order; what it is tied to stays."""
    head = model.get_output_embeddings()
    whole = dict(head.named_parameters(recurse=False)) if len(tokens) < len(head.weight) else {}
    try:
        for name, parameter in whole.items():
            setattr(head, name, nn.Parameter(parameter.data[tokens], requires_grad=False))
        yield
    finally:
        for name, parameter in whole.items():
            setattr(head, name, parameter)
