"""Text from any causal language model of transformers, one token at a time: the decode loop and sampling in torch."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.checkpoint.shortlist import Shortlist
from secateur.errors import ModelError
from secateur.runtime.cancelling import Cancelled, IsCancelled
from secateur.runtime.options import GenerationOptions
from secateur.runtime.text import check_scored


@dataclass(frozen=True, eq=False)
class TransformersCodec:
    """A tokenizer of transformers."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def begin_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        found: int | None = self.tokenizer.bos_token_id
        return found

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that the tokenizer adds."""
        return list(self.tokenizer(text)["input_ids"])

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text alone, with nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token_id(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, or None."""
        found: int | None = self.tokenizer.convert_tokens_to_ids(token)  # of an unknown one the id of the unknown token
        return found if found is not None and self.tokenizer.convert_ids_to_tokens(found) == token else None

    def special_tokens(self) -> set[str]:
        """Return the tokens that no text has."""
        return {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids; special tokens have none."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TransformersBackend:
    """Any decoder that transformers opens, run by torch.

    Attributes
    ----------
    model, tokenizer
        The transformers objects; the model is in evaluation mode.
    shortlist
        The tokens that a trimmed head computes, and no others are generated; None when there is no such head.
    """

    name = "torch"
    together = False

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shortlist: Shortlist | None = None
    ) -> None:
        self.model, self.tokenizer, self.shortlist = model, tokenizer, shortlist
        self.codec = TransformersCodec(tokenizer)
        self.max_positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def generate(
        self,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        *,
        end_ids: frozenset[int] = frozenset(),
        cancelled: IsCancelled | None = None,
    ) -> Iterator[int]:
        """Yield new token ids; see `generate_token_ids`."""
        ends = end_of_sequence_ids(self.model, self.tokenizer) | end_ids
        return generate_token_ids(self.model, prompt_ids, options, ends, shortlist=self.shortlist, cancelled=cancelled)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        end_ids: frozenset[int] = frozenset(),
        cancelled: IsCancelled | None = None,
    ) -> list[Iterator[int]]:
        """Return for each prompt what `generate` does, one after the other."""
        return [
            self.generate(ids, options.of_text(i), end_ids=end_ids, cancelled=cancelled)
            for i, ids in enumerate(prompts)
        ]

    def log_likelihood(self, token_ids: Sequence[int], begin: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return how likely each token from place `begin` on is, and whether none is more so; see `Backend`."""
        check_scored(token_ids, begin, self.max_positions, self.model.config.get_text_config().vocab_size)
        if begin == len(token_ids):
            return np.empty(0), np.empty(0, dtype=np.bool_)
        logits = _all_logits(self.model, token_ids, len(token_ids) - begin)
        if self.shortlist is not None:
            allowed = torch.from_numpy(self.shortlist.tokens).long()
            logits = torch.full_like(logits, -torch.inf).index_copy(1, allowed, logits[:, allowed])
        chosen = logits.gather(1, torch.tensor(token_ids[begin:])[:, None]).squeeze(1)
        total = logits.double().logsumexp(1)
        _refuse_nan(self.model, torch.where(total.isfinite(), total, torch.nan))
        values = chosen.double() - total
        return values.numpy(), (chosen == logits.amax(1)).numpy()


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token id that ends a text: those of the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for holder in (model.generation_config, model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return frozenset(found)


def generate_token_ids(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    options: GenerationOptions,
    end_ids: frozenset[int],
    *,
    shortlist: Shortlist | None = None,
    cancelled: IsCancelled | None = None,
) -> Iterator[int]:
    """Yield new token ids until `max_new_tokens`, or before the first of `end_ids` unless they are ignored.

    With a shortlist no other tokens are chosen. The text also ends when `cancelled` says so, which is asked before each
    operation of the model.
    """
    allowed = None if shortlist is None else torch.from_numpy(shortlist.tokens).long()
    generator = torch.Generator()
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    known = list(prompt_ids)
    step, cache = known, None
    for _ in range(options.max_new_tokens):
        try:
            with _Watched(cancelled) if cancelled else nullcontext():
                logits, cache = _forward(model, step, cache)
        except Cancelled:
            return
        if allowed is not None:
            logits = torch.full_like(logits, -torch.inf).index_copy(0, allowed, logits[allowed])
        token_id = choose_token(logits, options, generator, known)
        if token_id in end_ids and not options.ignore_eos:
            return
        yield token_id
        known.append(token_id)
        step = [token_id]


class _Watched(TorchFunctionMode):
    """Asks before each function of torch, on this thread, whether to go on; the step of a long prompt has many."""

    def __init__(self, cancelled: IsCancelled) -> None:
        super().__init__()
        self._cancelled = cancelled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._cancelled():
            raise Cancelled
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def _forward(model: PreTrainedModel, token_ids: list[int], cache: Any) -> tuple[Tensor, Any]:
    """Return float32 CPU logits [vocabulary] after the last token, and the cache that now holds all tokens."""
    # Inference mode is entered here and not around the loop: it must not be on while a caller of the iterator runs.
    inputs = {"input_ids": torch.tensor([token_ids], device=model.device), "past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    output = model(**inputs)
    logits = output.logits[0, -1].float().cpu()
    _refuse_nan(model, logits)
    return logits, output.past_key_values


@torch.inference_mode()
def _all_logits(model: PreTrainedModel, token_ids: Sequence[int], count: int) -> Tensor:
    """Return float32 CPU logits [count, vocabulary] that the last `count` tokens are told by."""
    inputs = {"input_ids": torch.tensor([list(token_ids[:-1])], device=model.device), "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = count
    logits: Tensor = model(**inputs).logits[0, -count:].float().cpu()
    _refuse_nan(model, logits)
    return logits


def _refuse_nan(model: PreTrainedModel, logits: Tensor) -> None:
    if logits.isnan().any():
        raise ModelError(
            f"the model in {model.name_or_path!r} computes NaN: its weights are damaged, or overflow in {model.dtype}; "
            "fetch or derive it again"
        )


def choose_token(
    logits: Tensor, options: GenerationOptions, generator: torch.Generator, known: Sequence[int] = ()
) -> int:
    """Return the id of the next token after the `known` ones, from float32 `logits` [vocabulary]."""
    if options.repetition_penalty != 1 and known:
        occurred = torch.tensor(sorted(set(known)))
        scores = logits[occurred]
        penalty = options.repetition_penalty
        logits = logits.index_copy(0, occurred, torch.where(scores < 0, scores * penalty, scores / penalty))
    if options.temperature == 0:
        return int(logits.argmax())
    # Sorted, stable: the draw then does not depend on how ties are broken inside topk.
    values, order = (logits / options.temperature).sort(descending=True, stable=True)
    if options.top_k:
        values, order = values[: options.top_k], order[: options.top_k]
    probabilities = values.softmax(-1)
    if options.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # the first token always stays
        probabilities = probabilities.where(before < options.top_p, 0.0)
    probabilities = probabilities.where(probabilities >= options.min_p * probabilities[0], 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
