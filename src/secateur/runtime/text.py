"""Text to tokens and tokens to text, the same for every way to run a model."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from secateur.errors import ConfigError

if TYPE_CHECKING:
    from secateur.runtime.loaded import Backend

# Tokens of the prompt that are decoded together with the new text, because some tokenizers drop a leading space.
_CONTEXT_TOKENS = 5


class Codec(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def begin_id(self) -> int | None:
        """The token that begins a text, if there is one."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that the tokenizer adds."""

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text alone, with nothing added."""

    def token_id(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, or None."""

    def special_tokens(self) -> set[str]:
        """Return the tokens that no text has."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids; special tokens have none."""


def encode_prompt(prompt: str, codec: Codec, max_new_tokens: int, max_positions: int | None) -> list[int]:
    """Return the token ids of `prompt`, with the special tokens that the tokenizer adds.

    Raises
    ------
    ConfigError
        When there is nothing to start from, or prompt and new tokens exceed the positions that the model knows.
    """
    check_text("prompt", prompt)
    token_ids = codec.encode(prompt)
    if not token_ids and codec.begin_id is not None:
        token_ids = [codec.begin_id]
    if not token_ids:
        raise ConfigError("the prompt is empty and this model has no token for the begin of a text; give some text")
    check_length(token_ids, max_new_tokens, max_positions)
    return token_ids


def check_text(name: str, text: str) -> None:
    """Raise `ConfigError` when something is no text: no string, or one that holds halves of surrogate pairs."""
    if not isinstance(text, str):
        raise ConfigError(f"the {name} is {text!r}; give text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the {name} {text[:60]!a} holds bytes that are not UTF-8; give text") from None


def check_length(token_ids: Sequence[int], max_new_tokens: int, max_positions: int | None) -> None:
    """Raise `ConfigError` when prompt and new tokens exceed the positions that the model knows."""
    if max_positions is not None and len(token_ids) + max_new_tokens > max_positions:
        raise ConfigError(
            f"prompt of {len(token_ids)} tokens and {max_new_tokens} new ones exceed the {max_positions} positions of "
            "this model; shorten the prompt or ask for fewer new tokens"
        )


def check_prompt(name: str, prompt: str, backend: "Backend", max_new_tokens: int) -> None:
    """Raise the `ConfigError` of `encode_prompt` for one of many prompts, by its name."""
    try:
        encode_prompt(prompt, backend.codec, max_new_tokens, backend.max_positions)
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be asked: {error}") from None


def check_scored(token_ids: Sequence[int], begin: int, max_positions: int | None, vocabulary: int) -> None:
    """Raise `ConfigError` when the tokens from place `begin` on cannot be told the likelihood of.

    The last token is only told, and takes no position.
    """
    if not 1 <= begin <= len(token_ids):
        raise ConfigError(f"likelihood from token {begin} on of {len(token_ids)}; it has to be between 1 and that")
    if max_positions is not None and len(token_ids) - 1 > max_positions:
        raise ConfigError(f"a text of {len(token_ids)} tokens exceeds the {max_positions} positions of this model")
    if not all(0 <= token < vocabulary for token in token_ids):
        raise ConfigError(f"a token is outside of the vocabulary of {vocabulary}; the tokenizer may be another model's")


def decode_pieces(token_ids: Iterable[int], codec: Codec, prompt_ids: Sequence[int]) -> Iterator[str]:
    """Yield the text of `token_ids` as it becomes certain: no piece ends inside a character or is empty.

    Special tokens have no text. Bytes that never become a character come out as U+FFFD.
    """
    ids = list(prompt_ids[-_CONTEXT_TOKENS:])
    start, given = 0, len(ids)  # text of ids[start:given] has been given out, or belongs to the prompt

    def text(end: int | None) -> str:
        return codec.decode(ids[start:end])

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


def join_in_turns(streams: Sequence[Iterator[str]]) -> list[str]:
    """Return the whole text of each stream, taking one piece of each in turn."""
    texts = [""] * len(streams)
    running = dict(enumerate(streams))
    while running:
        for index in list(running):
            piece = next(running[index], None)
            if piece is None:
                del running[index]
            else:
                texts[index] += piece
    return texts


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with, shorter than `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
