"""A loaded model behind lm-eval's interface, native or torch, its answers kept in a journal as they come."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from secateur.errors import ConfigError, ModelError
from secateur.evaluation.journal import Journal
from secateur.evaluation.questions.asking import SHORTENED
from secateur.models.source import load_tokenizer
from secateur.runtime.loaded import LoadedModel
from secateur.runtime.text import check_prompt

NEW_TOKENS = 256  # of an answer, where a task does not say how many
TOGETHER = 32  # answers that are computed together, and kept together
_WINDOW = 2048  # tokens of a window of running text, where the model does not say how many it takes


class JournalLM(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's requests, in their order, and keeps each batch of answers before it begins the next.

    A journal that has some already is gone on with, so an interruption costs one batch. Each record has `task_id`, and
    `log_likelihood` in nats (null for minus infinity) with `greedy` (whether each token is the likeliest one), or
    `completion`; `shortened` where the beginning of a question that is too long was left out.

    Parameters
    ----------
    name
        The task's; records are called by it and the document's number.
    places
        Numbers of the documents that are asked, in lm-eval's order; None when those are the numbers.
    batch
        Answers that are computed together, and kept together.
    """

    def __init__(
        self,
        model: LoadedModel,
        journal: Journal,
        progress: Callable[[int, int], None],
        *,
        name: str,
        places: Sequence[int] | None = None,
        batch: int = TOGETHER,
    ) -> None:
        super().__init__()
        self._model, self._journal, self._progress, self._batch = model, journal, progress, batch
        self._name, self._places = name, places
        self._chat = load_tokenizer(model.path)
        self._used = 0  # records of the journal that have answered a request

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text of which nothing is known."""
        begin = self._model.backend.codec.begin_id
        found = self._chat.eos_token_id if begin is None else begin
        if found is None:
            raise ModelError(f"nothing says which token begins or ends a text of {str(self._model.path)!r}")
        return int(found)

    @property
    def max_length(self) -> int:
        """Tokens that the model takes."""
        return self._model.backend.max_positions or _WINDOW

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells caches of requests apart by."""
        return str(self._model.path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return turns as the model's own template writes them."""
        asked: str = self._chat.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return asked

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text, by default with what the tokenizer puts before it."""
        codec = self._model.backend.codec
        return codec.encode_plain(string) if add_special_tokens is False else codec.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return how likely each continuation is behind its context, and whether it is what the model would write."""
        self._asked = self._names(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        def answer(some: Sequence[tuple[tuple[str, str], list[int], list[int]]]) -> Iterator[dict[str, Any]]:
            for _, context, continuation in some:
                token_ids = [*context, *continuation][-self.max_length - 1 :]  # the last one is told, and tells nothing
                begin = len(token_ids) - len(continuation)
                values, likeliest = self._model.backend.log_likelihood(token_ids, begin)
                total = float(values.sum())
                record = {"log_likelihood": total if math.isfinite(total) else None, "greedy": bool(likeliest.all())}
                shortened = len(token_ids) < len(context) + len(continuation)
                yield {**record, SHORTENED: True} if shortened else record

        for name, (_, _, told) in zip(self._asked, requests, strict=True):
            if not 1 <= len(told) <= self.max_length:
                raise ConfigError(f"a choice of {name} has {len(told)} tokens; the model takes 1 to {self.max_length}")
        return [(_nats(one), one["greedy"]) for one in self._answers(requests, self._asked, answer)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of as many tokens as the model takes, 2,048 at most."""

        def answer(some: Sequence[Instance]) -> Iterator[dict[str, Any]]:
            for request in some:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=min(self.max_length, _WINDOW) - 1,
                    context_len=1,
                )
                total = 0.0
                for context, continuation in map(make_disjoint_window, windows):
                    values, _ = self._model.backend.log_likelihood([*context, *continuation], len(context))
                    total += float(values.sum())
                yield {"log_likelihood": total if math.isfinite(total) else None}

        return [_nats(one) for one in self._answers(requests, self._names(requests), answer)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes up to a string at which an answer ends."""

        def answer(some: Sequence[Instance]) -> Iterator[dict[str, Any]]:
            prompts = [request.args[0] for request in some]
            for text in self._model.generate_batch(prompts, **_options(some[0].args[1])):
                yield {"completion": text}

        if len({str(request.args[1]) for request in requests}) > 1:
            raise ConfigError("requests of one task that are to end in different ways are not supported")
        names = self._names(requests)
        backend = self._model.backend
        for name, request in zip(names, requests, strict=True):  # better found now than after hours
            check_prompt(name, request.args[0], backend, _options(request.args[1])["max_new_tokens"])
        return [one["completion"] for one in self._answers(requests, names, answer)]

    def _names(self, requests: Sequence[Instance]) -> list[str]:
        numbers = [one.doc_id if self._places is None else self._places[one.doc_id] for one in requests]
        return [f"{self._name}/{number}" for number in numbers]

    def _answers(
        self,
        requests: Sequence[Any],
        names: Sequence[str],
        answer: Callable[[Sequence[Any]], Iterator[dict[str, Any]]],
    ) -> list[dict[str, Any]]:
        """Return a record for each request: those of the journal, then new ones, whole batches at a time."""
        found = self._journal.in_batches(
            names, self._batch, lambda some: answer(requests[some]), self._progress, self._used
        )
        self._used += len(requests)
        return found


def _nats(record: dict[str, Any]) -> float:
    value = record["log_likelihood"]
    return -math.inf if value is None else float(value)


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """Return lm-eval's settings of an answer as those of `LoadedModel.generate_batch`."""
    known = dict(settings)
    until = known.pop("until", None) or []
    draws = known.pop("do_sample", False)
    temperature = float(known.pop("temperature", None) or (1.0 if draws else 0.0))
    options: dict[str, Any] = {
        "stop": tuple(one for one in ([until] if isinstance(until, str) else until) if one),
        "temperature": temperature if draws else 0.0,
        "max_new_tokens": int(known.pop("max_gen_toks", None) or known.pop("max_new_tokens", None) or NEW_TOKENS),
        "seed": 0,
    }
    for name in ("top_p", "top_k"):
        if name in known:
            options[name] = known.pop(name)
    if known:
        raise ConfigError(f"answers with {', '.join(sorted(known))} are not supported; choose another task")
    return options
