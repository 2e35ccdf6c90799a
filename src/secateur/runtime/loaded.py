"""A model that is ready to generate: what every way to run one has to offer, and text from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from secateur.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from secateur.runtime.cancelling import IsCancelled
    from secateur.runtime.options import GenerationOptions
    from secateur.runtime.text import Codec


class Backend(Protocol):
    """A way to run a model."""

    name: str
    max_positions: int | None

    @property
    def codec(self) -> "Codec":
        """From text to tokens and back."""

    @property
    def tokenizer(self) -> Any:
        """The codec's own tokenizer."""

    @property
    def together(self) -> bool:
        """Whether the texts of a batch are computed together, so that their iterators should take turns."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        options: "GenerationOptions",
        *,
        end_ids: frozenset[int] = frozenset(),
        cancelled: "IsCancelled | None" = None,
    ) -> Iterator[int]:
        """Yield new token ids until there are enough, or before one that ends the text, or until it is cancelled."""

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        options: "GenerationOptions",
        *,
        end_ids: frozenset[int] = frozenset(),
        cancelled: "IsCancelled | None" = None,
    ) -> list[Iterator[int]]:
        """Return for each prompt what `generate` does."""

    def log_likelihood(self, token_ids: Sequence[int], begin: int) -> "tuple[NDArray[np.float64], NDArray[np.bool_]]":
        """Return how likely the model finds each token from place `begin` on, given all before it.

        Parameters
        ----------
        token_ids
            Of the model's tokenizer.
        begin
            1 or more: the first token has nothing before it.

        Returns
        -------
        values
            Natural logarithms of probabilities [tokens - begin].
        likeliest
            Whether no other token is more likely [tokens - begin].

        Raises
        ------
        ConfigError
            When `begin` is no place behind a token, or there are more tokens than the model takes.
        ModelError
            When the model computes NaN.
        """


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer.

    Attributes
    ----------
    path
        The Hugging Face folder that it was read from.
    backend
        What runs it: `backend.name` is `native` or `torch`.
    """

    path: Path
    backend: Backend = field(repr=False)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: of transformers with the engine `torch`, of tokenizers with `native`."""
        return self.backend.tokenizer

    @property
    def model(self) -> "PreTrainedModel":
        """The transformers model; raises `ModelError` when the model runs natively."""
        if self.backend.name != "torch":
            raise ModelError(f"{str(self.path)!r} runs natively, without transformers; load it with engine='torch'")
        model: PreTrainedModel = self.backend.model  # type: ignore[attr-defined]
        return model

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        *,
        suffix: str | None = None,
        cancelled: "IsCancelled | None" = None,
        **options: Any,
    ) -> str:
        """Return the text that follows `prompt`, without the prompt.

        Parameters
        ----------
        prompt
            Text, special tokens included where the model uses them; no chat template is applied.
        max_new_tokens, temperature
            The default takes the most likely token each time.
        suffix
            Text that is to follow the answer (fill-in-the-middle); then neither it nor `prompt` holds special tokens.
        cancelled
            Asked again and again whether the answer is still wanted, such as `threading.Event().is_set`; once it says
            True the text ends where it is, even while the prompt is read.
        **options
            `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed`, `stop`, `ignore_eos`: see
            `secateur.runtime.options.GenerationOptions`.

        Raises
        ------
        ConfigError
            When an option cannot be used, the prompt is empty or too long for the model.
        ModelError
            When there is a suffix and the model has no tokens for fill-in-the-middle.
        """
        return "".join(self.stream(prompt, max_new_tokens, temperature, suffix=suffix, cancelled=cancelled, **options))

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        *,
        suffix: str | None = None,
        cancelled: "IsCancelled | None" = None,
        **options: Any,
    ) -> Iterator[str]:
        """Return an iterator over the pieces of what `generate` returns, each as soon as it is certain.

        Pieces are whole characters and never empty. Takes and raises what `generate` does, before the first piece.
        """
        from secateur.runtime.options import make_options

        chosen = make_options({"max_new_tokens": max_new_tokens, "temperature": temperature, **options})
        (prompt_ids,), end_ids = self._encode([prompt], None if suffix is None else [suffix], chosen)
        token_ids = self.backend.generate(prompt_ids, chosen, end_ids=end_ids, cancelled=cancelled)
        return self._pieces(token_ids, prompt_ids, chosen)

    def generate_batch(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        *,
        suffixes: Sequence[str] | None = None,
        cancelled: "IsCancelled | None" = None,
        **options: Any,
    ) -> list[str]:
        """Return the text that follows each prompt.

        Natively one step computes a token of every text that goes on, and what all prompts begin with is computed
        once; torch takes one text after the other and gives exactly what `generate` does with the seed `seed + i` for
        text `i`. Natively that holds up to the order in which the kernels add, which depends on how many tokens a step
        has, and with integers up to the rounding of activations to 8 bits, which carries the difference on: where
        two tokens are about equally likely, the other one may be taken, and from there the texts differ.

        Parameters
        ----------
        prompts
            At most 64.
        suffixes
            For each prompt the text that is to follow the answer (fill-in-the-middle), as `suffix` of `generate`.
        max_new_tokens, temperature, cancelled, **options
            As for `generate`, for each text.

        Raises
        ------
        ConfigError
            As `generate`, and when there are too many prompts, or not as many suffixes.
        ModelError
            As `generate`.
        ResourceError
            When there is too little memory for so many texts.
        """
        from secateur.runtime.batch import check_batch
        from secateur.runtime.options import make_options
        from secateur.runtime.text import join_in_turns

        chosen = make_options({"max_new_tokens": max_new_tokens, "temperature": temperature, **options})
        check_batch(prompts)
        if suffixes is not None and len(suffixes) != len(prompts):
            raise ConfigError(f"there are {len(prompts)} prompts and {len(suffixes)} suffixes; give one for each")
        encoded, end_ids = self._encode(prompts, suffixes, chosen)
        # Nothing else holds the iterators over tokens: at its stop string a text closes its own, and leaves the batch.
        streams = [
            self._pieces(token_ids, prompt_ids, chosen)
            for token_ids, prompt_ids in zip(
                self.backend.generate_batch(encoded, chosen, end_ids=end_ids, cancelled=cancelled),
                encoded,
                strict=True,
            )
        ]
        return join_in_turns(streams) if self.backend.together else ["".join(pieces) for pieces in streams]

    def _encode(
        self, prompts: Sequence[str], suffixes: Sequence[str] | None, options: "GenerationOptions"
    ) -> tuple[list[list[int]], frozenset[int]]:
        """Return the token ids that each prompt is to the model, and those that end an answer beside the usual ones.

        Raises as `generate` does for prompts that are empty or too long, and without tokens for fill-in-the-middle.
        """
        from secateur.runtime import infill, text

        codec, limit = self.backend.codec, self.backend.max_positions
        if suffixes is None:
            return [text.encode_prompt(prompt, codec, options.max_new_tokens, limit) for prompt in prompts], frozenset()
        pairs = zip(prompts, suffixes, strict=True)
        requests = [infill.encode_infill(prompt, suffix, codec) for prompt, suffix in pairs]
        for request in requests:
            text.check_length(request.prompt_ids, options.max_new_tokens, limit)
        end_ids = frozenset[int]().union(*(request.end_ids for request in requests))
        return [request.prompt_ids for request in requests], end_ids

    def _pieces(
        self, token_ids: Iterator[int], prompt_ids: Sequence[int], options: "GenerationOptions"
    ) -> Iterator[str]:
        """Return an iterator over the text of new tokens, up to a stop string."""
        from secateur.runtime import text

        return text.cut_at_stop(text.decode_pieces(token_ids, self.backend.codec, prompt_ids), options.stop)
