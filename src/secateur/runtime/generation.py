"""Text from a causal language model, one token at a time: sampling, the decode loop, and tokens to text.

Only what is asked for here changes the model's distribution: penalties and temperatures that a `generation_config`
carries are not applied; of that file only the end-of-sequence tokens count.
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import ConfigError, ModelError

# Tokens of the prompt that are decoded together with the new text, because some tokenizers drop a leading space.
_CONTEXT_TOKENS = 5


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated; refuses values that cannot be used with `ConfigError`.

    Attributes
    ----------
    max_new_tokens
        Upper bound on the tokens generated, at least 1.
    temperature
        0 takes the most likely token; otherwise logits are divided by it before a token is drawn.
    top_k
        Draw among the `top_k` most likely tokens; 0 means all.
    top_p
        Draw among the fewest most likely tokens whose probabilities sum to `top_p`, 0 < top_p <= 1 (Holtzman et al.
        2020). Applied after temperature and `top_k`.
    seed
        Makes draws repeatable on one machine; None draws differently each time.
    stop
        Texts before which the output ends; they are not part of it.
    ignore_eos
        Go on after an end-of-sequence token, to reach `max_new_tokens` in a measurement.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # a string is a sequence of one-letter stops to Python, to nobody else
            object.__setattr__(self, "stop", (self.stop,))
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (most likely token) or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more, and below 2^64")
        if "" in self.stop:
            raise ConfigError("an empty stop string would stop every text before its first character; leave it out")


def encode_prompt(
    prompt: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[int]:
    """Return the token ids of `prompt`, with the special tokens that the tokenizer adds.

    Raises
    ------
    ConfigError
        When there is nothing to start from, or prompt and new tokens exceed the positions that the model knows.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the prompt {prompt[:60]!a} holds bytes that are not UTF-8; give text") from None
    token_ids: list[int] = list(tokenizer(prompt)["input_ids"])
    if not token_ids and tokenizer.bos_token_id is not None:
        token_ids = [tokenizer.bos_token_id]
    if not token_ids:
        raise ConfigError("the prompt is empty and this model has no token for the begin of a text; give some text")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and len(token_ids) + max_new_tokens > positions:
        raise ConfigError(
            f"prompt of {len(token_ids)} tokens and {max_new_tokens} new ones exceed the {positions} positions of this "
            "model; shorten the prompt or ask for fewer new tokens"
        )
    return token_ids


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token id that ends a text: those of the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for holder in (model.generation_config, model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return frozenset(found)


def generate_token_ids(
    model: PreTrainedModel, prompt_ids: Sequence[int], options: GenerationOptions, end_ids: frozenset[int]
) -> Iterator[int]:
    """Yield new token ids until `max_new_tokens`, or before the first of `end_ids` unless they are ignored."""
    generator = torch.Generator()
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    logits, cache = _forward(model, list(prompt_ids), None)
    for remaining in range(options.max_new_tokens, 0, -1):
        token_id = choose_token(logits, options, generator)
        if token_id in end_ids and not options.ignore_eos:
            return
        yield token_id
        if remaining > 1:
            logits, cache = _forward(model, [token_id], cache)


@torch.inference_mode()
def _forward(model: PreTrainedModel, token_ids: list[int], cache: Any) -> tuple[Tensor, Any]:
    """Return float32 CPU logits [vocabulary] after the last token, and the cache that now holds all tokens."""
    # Inference mode is entered here and not around the loop: it must not be on while a caller of the iterator runs.
    inputs = {"input_ids": torch.tensor([token_ids], device=model.device), "past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    output = model(**inputs)
    logits = output.logits[0, -1].float().cpu()
    if logits.isnan().any():
        raise ModelError(
            f"the model in {model.name_or_path!r} computes NaN: its weights are damaged, or overflow in {model.dtype}; "
            "fetch or derive it again"
        )
    return logits, output.past_key_values


def choose_token(logits: Tensor, options: GenerationOptions, generator: torch.Generator) -> int:
    """Return the id of the next token, from float32 `logits` [vocabulary]."""
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
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def decode_pieces(
    token_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]
) -> Iterator[str]:
    """Yield the text of `token_ids` as it becomes certain: no piece ends inside a character or is empty.

    Special tokens have no text. Bytes that never become a character come out as U+FFFD.
    """
    ids = list(prompt_ids[-_CONTEXT_TOKENS:])
    start, given = 0, len(ids)  # text of ids[start:given] has been given out, or belongs to the prompt

    def text(end: int | None) -> str:
        return str(tokenizer.decode(ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    for token_id in token_ids:
        ids.append(token_id)
        known, grown = text(given), text(None)
        if len(grown) > len(known) and not grown.endswith("\ufffd"):
            yield grown[len(known) :]
            start, given = given, len(ids)
    if rest := text(None)[len(text(given)) :]:
        yield rest


def cut_at_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Yield `pieces` up to the first occurrence of one of `stop`, never a part of a stop string that is complete."""
    held = ""  # the end of the text so far that may be the begin of a stop string
    for piece in pieces:
        held += piece
        found = [held.index(text) for text in stop if text in held]
        if found:
            if end := min(found):
                yield held[:end]
            return
        keep = max((_overlap(held, text) for text in stop), default=0)
        if ready := held[: len(held) - keep]:
            yield ready
            held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with, shorter than `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
