"""The texts that a native model has in its memory, and the steps that lengthen them.

What the last text has in common with a new prompt is not computed again.
"""

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import RLock

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.cancelling import IsCancelled
from secateur.runtime.native_model import CHUNK, NativeModel, NativeSequence

MIN_CAPACITY = 2048  # tokens: address space, not memory, until they come
CAPACITY_STEP = 1024
# More tokens than the kernels for a few take, which add up in another order: so a prompt that is read again, from its
# known beginning on, has the logits that it had, to the bit.
READ_ANEW = 16


@dataclass(eq=False)
class Context:
    """A sequence and the tokens that it holds."""

    sequence: NativeSequence
    tokens: list[int] = field(default_factory=list)

    def common_prefix(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt need not be computed; the last ones always are."""
        limit = max(0, min(len(self.tokens), len(prompt) - READ_ANEW))
        return next((i for i in range(limit) if self.tokens[i] != prompt[i]), limit)

    def copy(self, source: "Context", length: int) -> None:
        """Become the first `length` tokens of another context."""
        self.sequence.copy(source.sequence, length)
        self.tokens = source.tokens[:length]


class Contexts:
    """The contexts of one model, whose steps come one after the other, from whichever thread.

    Attributes
    ----------
    max_positions
        Tokens of the longest text that the model knows; None means that nothing is known.
    """

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self.max_positions: int | None = model.architecture.max_positions
        self._idle: Context | None = None
        # Reentrant: a stream that was given up may be closed by the garbage collector, in the midst of a step.
        self._lock = RLock()
        if hasattr(os, "register_at_fork"):
            reference = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _renew_lock(reference()))

    def new(self, capacity: int) -> Context:
        """Return an empty context with room for `capacity` tokens."""
        return Context(NativeSequence(self._model, capacity))

    def take(self, prompt_ids: Sequence[int], length: int) -> Context:
        """Return a context with room for `length` tokens, holding what the last text shares with the prompt."""
        with self._lock:
            idle, self._idle = self._idle, None
        known = idle.common_prefix(prompt_ids) if idle else 0
        if idle and idle.sequence.capacity >= length:
            idle.sequence.truncate(known)
            del idle.tokens[known:]
            return idle
        roomy = max(MIN_CAPACITY, -(-length // CAPACITY_STEP) * CAPACITY_STEP)
        context = self.new(max(length, min(roomy, self.max_positions or roomy)))
        if idle and known:
            context.copy(idle, known)
        return context

    def forget(self) -> None:
        """Keep nothing of the last text, nor its memory."""
        with self._lock:
            self._idle = None

    def give_back(self, context: Context) -> None:
        """Keep a context for the next `take`: the last text is the likeliest to go on."""
        with self._lock:
            self._idle = context

    def step(
        self,
        tokens: Sequence[int],
        contexts: Sequence[Context],
        wants: Sequence[bool],
        cancelled: IsCancelled | None = None,
    ) -> NDArray[np.float32]:
        """Append a token to each of `contexts`, and return the logits [wanted, vocabulary] after those wanted.

        Raises
        ------
        Cancelled
            When `cancelled` says so; then no context has changed.
        """
        with self._lock:
            logits = self._model.forward(tokens, [context.sequence for context in contexts], wants, cancelled)
        for token, context in zip(tokens, contexts, strict=True):
            context.tokens.append(token)
        return logits

    def prefill(
        self,
        tokens: Sequence[int],
        contexts: Sequence[Context],
        wants: Sequence[bool],
        cancelled: IsCancelled | None = None,
    ) -> NDArray[np.float32]:
        """Do what `step` does, for any number of tokens: those that were done when it is cancelled stay."""
        found = []
        parts = -(-len(tokens) // CHUNK)
        for index in range(parts):  # of nearly the same size, so that none is left with a few tokens
            part = slice(len(tokens) * index // parts, len(tokens) * (index + 1) // parts)
            found.append(self.step(tokens[part], contexts[part], wants[part], cancelled))
        return np.concatenate(found)


def _renew_lock(contexts: Contexts | None) -> None:
    """Give a forked process a lock of its own: another thread of the parent may have held the old one."""
    if contexts is not None:
        contexts._lock = RLock()
