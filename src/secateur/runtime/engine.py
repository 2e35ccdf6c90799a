"""Generation by the native engine: from a folder to a model that runs packed, from a prompt to tokens.

Needs neither torch nor transformers: a folder is ready in well under a second when its files are in the page cache.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from secateur.checkpoint.format import check_quantization_config, read_json
from secateur.errors import CheckpointError, ConfigError, ModelError, NativeCodeError
from secateur.runtime.architecture import Architecture, NotNativeError, read_architecture
from secateur.runtime.kernels import load_library
from secateur.runtime.native_model import NativeModel, NativeSequence
from secateur.runtime.options import GenerationOptions
from secateur.runtime.sampling import Sampler
from secateur.runtime.threads import usable_threads

if TYPE_CHECKING:
    from secateur.models.source import ModelFolder

MIN_CAPACITY = 2048  # tokens: address space, not memory, until they come
CAPACITY_STEP = 1024
MAX_THREADS = 1024
PREFILL = 256  # tokens of a prompt in one step; between two steps a caller may stop


@dataclass(frozen=True, eq=False)
class TokenizersCodec:
    """A tokenizer.json."""

    tokenizer: Tokenizer
    begin_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that the tokenizer adds."""
        return list(self.tokenizer.encode(text).ids)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids; special tokens have none."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


@dataclass(eq=False)
class _Cached:
    """A sequence and the tokens that it holds."""

    sequence: NativeSequence
    tokens: list[int] = field(default_factory=list)

    def common_prefix(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt need not be computed; the last one always is, for its logits."""
        limit = min(len(self.tokens), len(prompt) - 1)
        return next((i for i in range(limit) if self.tokens[i] != prompt[i]), limit)


class NativeBackend:
    """A model that the native engine runs.

    What the last texts have in common with a new prompt is not computed again.
    """

    name = "native"

    def __init__(self, model: NativeModel, codec: TokenizersCodec, end_ids: frozenset[int]) -> None:
        self.model, self.codec, self.end_ids = model, codec, end_ids
        self.tokenizer = codec.tokenizer
        self.max_positions: int | None = model.architecture.max_positions
        self._idle: list[_Cached] = []
        # Reentrant: a stream that was given up may be closed by the garbage collector, in the midst of a step.
        self._lock = RLock()
        if hasattr(os, "register_at_fork"):
            reference = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _renew_lock(reference()))

    def generate(self, prompt_ids: Sequence[int], options: GenerationOptions) -> Iterator[int]:
        """Yield new token ids until `max_new_tokens`, or before one that ends a text unless they are ignored.

        Raises
        ------
        ModelError
            When the model computes NaN: its weights are damaged.
        ConfigError
            When there is no token to start from, or one is not of the vocabulary.
        """
        if not len(prompt_ids):
            raise ConfigError("a prompt of no tokens has nothing to go on from; give at least one")
        sampler = Sampler(options)
        cached = self._take(prompt_ids, len(prompt_ids) + options.max_new_tokens)
        try:
            logits = self._prefill(cached, prompt_ids)
            for remaining in range(options.max_new_tokens, 0, -1):
                token_id = sampler.choose(logits, cached.tokens)
                if token_id in self.end_ids and not options.ignore_eos:
                    return
                yield token_id
                if remaining > 1:
                    logits = self._step(cached, [token_id])
        finally:
            with self._lock:
                self._idle = [cached]  # the last text is the likeliest to go on

    def _take(self, prompt_ids: Sequence[int], length: int) -> _Cached:
        """Return an idle sequence with room for `length` tokens, cut to what it shares with the prompt."""
        with self._lock:
            found = next((one for one in self._idle if one.sequence.capacity >= length), None)
            self._idle = []
        if found is None:
            roomy = max(MIN_CAPACITY, -(-length // CAPACITY_STEP) * CAPACITY_STEP)
            return _Cached(NativeSequence(self.model, max(length, min(roomy, self.max_positions or roomy))))
        known = found.common_prefix(prompt_ids)
        found.sequence.truncate(known)
        del found.tokens[known:]
        return found

    def _prefill(self, cached: _Cached, prompt_ids: Sequence[int]) -> NDArray[np.float32]:
        logits = np.empty(0, dtype=np.float32)
        for start in range(len(cached.tokens), len(prompt_ids), PREFILL):
            logits = self._step(cached, prompt_ids[start : start + PREFILL], last=start + PREFILL >= len(prompt_ids))
        return logits

    def _step(self, cached: _Cached, tokens: Sequence[int], *, last: bool = True) -> NDArray[np.float32]:
        """Append tokens, and return the logits [vocabulary] after the last of them if they are wanted."""
        wants = [False] * (len(tokens) - 1) + [last]
        with self._lock:
            logits = self.model.forward(tokens, [cached.sequence] * len(tokens), wants)
        cached.tokens.extend(tokens)
        return logits[0] if last else np.empty(0, dtype=np.float32)


def _renew_lock(backend: NativeBackend | None) -> None:
    """Give a forked process a lock of its own: another thread of the parent may have held the old one."""
    if backend is not None:
        backend._lock = RLock()


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
    model = NativeModel(architecture, folder.weight_files(), stored, threads or usable_threads())
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
