"""Generation by the native engine: from a folder to a model that runs packed, from a prompt to tokens.

Needs neither torch nor transformers: a folder is ready in well under a second when its files are in the page cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from secateur.checkpoint.format import check_quantization_config, read_json
from secateur.errors import CheckpointError, ConfigError, ModelError, NativeCodeError
from secateur.resources import usable_processors
from secateur.runtime.architecture import Architecture, NotNativeError, read_architecture
from secateur.runtime.batch import NativeBatch, check_memory
from secateur.runtime.cancelling import Cancelled, IsCancelled
from secateur.runtime.contexts import Context, Contexts
from secateur.runtime.kernels import load_library
from secateur.runtime.native_model import NativeModel
from secateur.runtime.options import GenerationOptions
from secateur.runtime.sampling import Sampler
from secateur.runtime.text import check_scored

if TYPE_CHECKING:
    from secateur.models.source import ModelFolder

MAX_THREADS = 1024
_SCORED_TOGETHER = 256  # tokens, whose logits take a megabyte each with a vocabulary of 256 thousand


@dataclass(frozen=True, eq=False)
class TokenizersCodec:
    """A tokenizer.json."""

    tokenizer: Tokenizer
    begin_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that the tokenizer adds."""
        return list(self.tokenizer.encode(text).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text alone, with nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, or None."""
        found: int | None = self.tokenizer.token_to_id(token)
        return found

    def special_tokens(self) -> set[str]:
        """Return the tokens that no text has."""
        return {token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special}

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids; special tokens have none."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


class NativeBackend:
    """A model that the native engine runs.

    What the last text has in common with a new prompt is not computed again, but for a batch, which begins anew.
    """

    name = "native"
    together = True

    def __init__(self, model: NativeModel, codec: TokenizersCodec, end_ids: frozenset[int]) -> None:
        self.model, self.codec, self.end_ids = model, codec, end_ids
        self.tokenizer = codec.tokenizer
        self.contexts = Contexts(model)
        self.max_positions = self.contexts.max_positions

    def generate(
        self,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        *,
        end_ids: frozenset[int] = frozenset(),
        cancelled: IsCancelled | None = None,
    ) -> Iterator[int]:
        """Yield new token ids until `max_new_tokens`, or before one that ends a text unless they are ignored.

        Parameters
        ----------
        end_ids
            Tokens that end this text, beside those that end any.
        cancelled
            Asked between tokens and, while a long prompt is read, between blocks; the text then ends.

        Raises
        ------
        ModelError
            When the model computes NaN: its weights are damaged.
        ConfigError
            When there is no token to start from, or one is not of the vocabulary.
        """
        if not len(prompt_ids):
            raise ConfigError("a prompt of no tokens has nothing to go on from; give at least one")
        ends = frozenset() if options.ignore_eos else self.end_ids | end_ids
        sampler = Sampler(options)
        context = self.contexts.take(prompt_ids, len(prompt_ids) + options.max_new_tokens)
        try:
            new = prompt_ids[len(context.tokens) :]
            wants = [False] * (len(new) - 1) + [True]
            logits = self.contexts.prefill(new, [context] * len(new), wants, cancelled)
            for remaining in range(options.max_new_tokens, 0, -1):
                token_id = sampler.choose(logits[-1], context.tokens)
                if token_id in ends:
                    return
                yield token_id
                if remaining > 1:
                    logits = self.contexts.step([token_id], [context], [True], cancelled)
        except Cancelled:
            return
        finally:
            self.contexts.give_back(context)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        end_ids: frozenset[int] = frozenset(),
        cancelled: IsCancelled | None = None,
    ) -> list[Iterator[int]]:
        """Return for each prompt what `generate` does, computed together; see `NativeBatch`.

        Raises
        ------
        ResourceError
            When there is too little memory for so many texts.
        """
        check_memory(self.model.architecture, [len(prompt) + options.max_new_tokens for prompt in prompts])
        ends = frozenset() if options.ignore_eos else self.end_ids | end_ids
        return NativeBatch(self.contexts, prompts, options, ends, cancelled).streams()

    def log_likelihood(self, token_ids: Sequence[int], begin: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return how likely each token from place `begin` on is, and whether none is more so; see `Backend`."""
        check_scored(token_ids, begin, self.max_positions, self.model.architecture.vocabulary)
        values, likeliest = np.empty(len(token_ids) - begin), np.empty(len(token_ids) - begin, dtype=np.bool_)
        context = self.contexts.take(token_ids[:begin], len(token_ids) - 1)
        try:
            for logits, place in self._logits_from(token_ids, begin, context):
                rows, targets = np.arange(len(logits)), np.asarray(token_ids[place : place + len(logits)])
                chosen, top = logits[rows, targets], logits.max(axis=1)
                rest = np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)) + top
                values[place - begin :][: len(logits)] = chosen - rest
                likeliest[place - begin :][: len(logits)] = chosen == top
                if not np.isfinite(rest).all():
                    raise ModelError("the model computes NaN: its weights are damaged; fetch or derive it again")
        finally:
            self.contexts.give_back(context)
        return values, likeliest

    def _logits_from(
        self, token_ids: Sequence[int], begin: int, context: Context
    ) -> Iterator[tuple[NDArray[np.float32], int]]:
        """Give logits [tokens, vocabulary] in some parts, each with the place of the token that its first row tells."""
        known, inputs = len(context.tokens), token_ids[:-1]
        parts = -(-(len(inputs) - known) // _SCORED_TOGETHER)
        for index in range(parts):  # of nearly the same size, so that none is left with a few tokens
            first = known + (len(inputs) - known) * index // parts
            last = known + (len(inputs) - known) * (index + 1) // parts
            wants = [place + 1 >= begin for place in range(first, last)]
            logits = self.contexts.step(inputs[first:last], [context] * (last - first), wants)
            if len(logits):
                yield logits, max(first + 1, begin)


def open_native(folder: "ModelFolder", *, threads: int | None = None) -> NativeBackend:
    """Open a sub-model or a dense model for the native engine.

    Parameters
    ----------
    threads
        None means as many as this process may use.

    Raises
    ------
    NotNativeError
        When the engine is not installed or does not run this model; transformers may.
    CheckpointError, ModelError
        When files are missing or damaged.
    ConfigError
        When `threads` is not positive.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads is {threads}; it must be at least 1, and at most {MAX_THREADS}")
    architecture = native_architecture(folder)
    config = read_json(folder.path / "config.json")
    stored = check_quantization_config(config["quantization_config"]) if folder.is_submodel() else None
    codec, end_ids = _read_tokenizer(folder, config)
    model = NativeModel(architecture, folder.weight_files(), stored, threads or usable_processors())
    return NativeBackend(model, codec, end_ids)


def native_architecture(folder: "ModelFolder") -> Architecture:
    """Return the architecture of a model that the engine runs, by what its config.json says.

    Raises
    ------
    NotNativeError
        When the engine is not installed or does not run this model.
    """
    try:
        load_library()
    except NativeCodeError as error:
        raise NotNativeError(str(error)) from None
    config = read_json(folder.path / "config.json")
    if config.get("quantization_config") and not folder.is_submodel():
        raise NotNativeError("quantised models of other programs are not run natively")
    return read_architecture(config)


def _read_tokenizer(folder: "ModelFolder", config: dict[str, Any]) -> tuple[TokenizersCodec, frozenset[int]]:
    path = folder.path / "tokenizer.json"
    if not path.exists():
        raise NotNativeError(f"{folder.name!r} has no tokenizer.json, which the native engine needs")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - tokenizers raises no other
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}); derive or fetch the model again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _read_optional(folder.path / "tokenizer_config.json")
    generation = _read_optional(folder.path / "generation_config.json")

    specials = _read_optional(folder.path / "special_tokens_map.json")

    def token_id(key: str) -> int | None:
        text = settings.get(key) or specials.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        try:
            return tokenizer.token_to_id(text) if isinstance(text, str) else None
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and no token is
            return None

    ends: set[int] = set()
    for found in (generation.get("eos_token_id"), config.get("eos_token_id"), token_id("eos_token")):
        listed = [] if found is None else found if isinstance(found, list) else [found]
        if not all(type(one) is int for one in listed):
            raise ModelError(f"eos_token_id of {folder.name!r} is {found!r}, expected numbers; fetch the model again")
        ends.update(listed)
    if not ends:
        raise NotNativeError(f"nothing says which token ends a text of {folder.name!r}")
    return TokenizersCodec(tokenizer, token_id("bos_token")), frozenset(ends)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
