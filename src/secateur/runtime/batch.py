"""Several texts generated together: each step of the model computes one token of every text that goes on.

A step reads the weights once, however many texts there are. What all prompts begin with is computed once.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secateur.errors import ConfigError, ResourceError
from secateur.resources import available_memory
from secateur.runtime.architecture import Architecture
from secateur.runtime.cancelling import Cancelled, IsCancelled
from secateur.runtime.contexts import Context, Contexts
from secateur.runtime.options import GenerationOptions
from secateur.runtime.sampling import Sampler

MAX_TEXTS = 64
HALF = 2  # bytes of an entry of a key or a value


@dataclass(eq=False)
class _Text:
    """One text: what is computed of it, and the tokens that were chosen and nobody has fetched yet."""

    context: Context
    sampler: Sampler
    remaining: int
    chosen: deque[int] = field(default_factory=deque)
    last: int = -1  # the token that the next step appends
    ended: bool = False

    def choose(self, logits: NDArray[np.float32], end_ids: frozenset[int]) -> None:
        """Choose the next token, unless the text ends."""
        self.last = self.sampler.choose(logits, self.context.tokens)
        if self.last in end_ids:
            self.ended = True
            return
        self.chosen.append(self.last)
        self.remaining -= 1
        self.ended = self.remaining == 0


class NativeBatch:
    """Texts that are generated together, by iterators that should be advanced in turns.

    An iterator that needs a token makes a step for all texts. One that is closed takes its text out of the batch, as
    the end of the text does.

    Parameters
    ----------
    prompts
        Token ids, at least one each; at most `MAX_TEXTS` prompts.
    options
        For all of them; each text draws with a seed of its own, see `GenerationOptions.of_text`.
    end_ids
        Tokens before which a text ends.
    cancelled
        Asked in each step; all texts then end.
    """

    def __init__(
        self,
        contexts: Contexts,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        end_ids: frozenset[int],
        cancelled: IsCancelled | None,
    ) -> None:
        self._contexts, self._prompts, self._options = contexts, prompts, options
        self._end_ids, self._cancelled = end_ids, cancelled
        self._texts: list[_Text] = []  # made when the first token is asked for

    def streams(self) -> list[Iterator[int]]:
        """Return an iterator over the new token ids of each text."""
        return [self._stream(index) for index in range(len(self._prompts))]

    def _stream(self, index: int) -> Iterator[int]:
        if not self._texts:
            self._begin()
        text = self._texts[index]
        try:
            while text.chosen or not text.ended:
                if not text.chosen:
                    self._step()
                else:
                    yield text.chosen.popleft()
        finally:
            text.ended = True

    def _begin(self) -> None:
        """Read all prompts, and choose the first token of each text."""
        lengths = [len(prompt) + self._options.max_new_tokens for prompt in self._prompts]
        shared = _common_prefix(self._prompts)
        # What a batch answers does not depend on what was answered before it.
        self._contexts.forget()
        contexts = [self._contexts.new(length) for length in lengths]
        first = contexts[0]
        self._texts = [
            _Text(context, Sampler(self._options.of_text(index)), self._options.max_new_tokens)
            for index, context in enumerate(contexts)
        ]
        try:
            if (begin := self._prompts[0][:shared]) and len(contexts) > 1:
                self._contexts.prefill(begin, [first] * len(begin), [False] * len(begin), self._cancelled)
            for context in contexts[1:]:
                context.copy(first, shared)
            rests = [prompt[len(one.tokens) :] for prompt, one in zip(self._prompts, contexts, strict=True)]
            tokens = [token for rest in rests for token in rest]
            owners = [one for one, rest in zip(contexts, rests, strict=True) for _ in rest]
            wants = [last for rest in rests for last in [False] * (len(rest) - 1) + [True]]
            self._choose(self._texts, self._contexts.prefill(tokens, owners, wants, self._cancelled))
        except Cancelled:
            self._end()

    def _step(self) -> None:
        active = [text for text in self._texts if not text.ended]
        tokens, contexts = [text.last for text in active], [text.context for text in active]
        try:
            self._choose(active, self._contexts.step(tokens, contexts, [True] * len(active), self._cancelled))
        except Cancelled:
            self._end()

    def _choose(self, texts: Sequence[_Text], logits: NDArray[np.float32]) -> None:
        for text, row in zip(texts, logits, strict=True):
            text.choose(row, self._end_ids)

    def _end(self) -> None:
        for text in self._texts:
            text.ended = True


def check_batch(prompts: Sequence[str]) -> None:
    """Raise `ConfigError` when prompts are no batch, or too many for one."""
    if isinstance(prompts, str):  # a string is a sequence of one-letter prompts to Python, to nobody else
        raise ConfigError(f"prompts is the text {prompts[:60]!a}; give a list of texts")
    if len(prompts) > MAX_TEXTS:
        raise ConfigError(f"a batch of {len(prompts)} prompts is too large; give at most {MAX_TEXTS} at a time")


def check_memory(architecture: Architecture, lengths: Sequence[int]) -> None:
    """Raise `ResourceError` when keys and values of texts of these lengths, in tokens, exceed the memory at hand."""
    a = architecture
    needed = sum(lengths) * 2 * HALF * a.blocks * a.kv_heads * a.head_dim
    if needed > (available := available_memory()):
        raise ResourceError(
            f"the keys and values of {len(lengths)} texts need up to {needed / 1e6:.0f} MB, and "
            f"{available / 1e6:.0f} MB are free; give fewer prompts at a time, or ask for fewer new tokens"
        )


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with; the last one of a prompt never counts, it gives logits."""
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(limit) if len({prompt[i] for prompt in prompts}) > 1), limit)
