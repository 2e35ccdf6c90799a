"""Answers of a model to the problems of a benchmark, in batches, so that an interruption loses at most one."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from secateur.errors import ConfigError
from secateur.evaluation.journal import Journal
from secateur.evaluation.programs.problem import FENCE, Problem
from secateur.models.source import load_tokenizer
from secateur.runtime.batch import MAX_TEXTS
from secateur.runtime.loaded import LoadedModel
from secateur.runtime.options import GenerationOptions
from secateur.runtime.text import encode_prompt

PROMPTS = "3"  # counts up when what models are asked changes
Style = Literal["auto", "plain", "chat"]


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    Attributes
    ----------
    style
        `plain` lets it go on from the problem's own text; `chat` asks in the model's chat template and begins the reply
        with a code block and that text (with MBPP the block alone); `auto` is `chat` where the model has a template.
    samples
        Answers to each problem; refuses numbers that cannot be used, as `GenerationOptions` does, with `ConfigError`.
    temperature
        0 takes the most likely token each time.
    seed
        Of draws.
    max_new_tokens
        Of an answer.
    batch
        Answers that are generated together.
    """

    style: str = "auto"
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 512
    batch: int = 32

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise ConfigError(f"prompt_style is {self.style!r}; it must be one of {', '.join(get_args(Style))}")
        if self.samples < 1 or not 1 <= self.batch <= MAX_TEXTS:
            raise ConfigError(
                f"answers is {self.samples} and batch {self.batch}; they are at least 1, batch at most {MAX_TEXTS}"
            )
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError("several answers at temperature 0 are the same one; give --temperature, such as 0.8")
        GenerationOptions(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed)

    def chosen(self, model: LoadedModel) -> str:
        """Return the style for a model: what `auto` stands for."""
        if self.style != "auto":
            return self.style
        return "chat" if getattr(load_tokenizer(model.path), "chat_template", None) else "plain"


def generate(
    model: LoadedModel,
    problems: Sequence[Problem],
    asking: Asking,
    journal: Journal,
    progress: Callable[[int, int], None],
) -> None:
    """Let a model answer, and append {"task_id", "sample", "completion"} of each answer to a journal.

    Answers are in the order of the problems, those to one problem one after the other.
    """
    prompts = Prompts(model.path, asking.chosen(model))
    for problem in problems:  # one that is too long is better found now than after hours
        encode_prompt(prompts.of(problem), model.backend.codec, asking.max_new_tokens, model.backend.max_positions)
    wanted = [(problem, number) for problem in problems for number in range(asking.samples)]

    def answer(some: slice) -> list[dict[str, Any]]:
        texts: dict[int, str] = {}
        for stop, places in _by_stop(wanted[some]):
            answers = model.generate_batch(
                [prompts.of(wanted[some][place][0]) for place in places],
                max_new_tokens=asking.max_new_tokens,
                temperature=asking.temperature,
                seed=_drawn_seed(asking.seed, some.start),
                stop=stop,
            )
            texts |= dict(zip(places, answers, strict=True))
        return [
            {"sample": number, "completion": problem.cut(texts[place])}
            for place, (problem, number) in enumerate(wanted[some])
        ]

    journal.in_batches([problem.task_id for problem, _ in wanted], asking.batch, answer, progress)


def _drawn_seed(seed: int, place: int) -> int:
    """Return the seed of a batch: numbers beside each other would let two seeds draw mostly the same answers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:8], "little")


def _by_stop(batch: Sequence[tuple[Problem, int]]) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """Give the places of answers that end at the same strings."""
    found: dict[tuple[str, ...], list[int]] = {}
    for place, (problem, _) in enumerate(batch):
        found.setdefault((*problem.stop, FENCE), []).append(place)
    yield from found.items()


class Prompts:
    """What a model, in a folder of its own, is given for a problem."""

    def __init__(self, model: Path, style: str) -> None:
        self.tokenizer = load_tokenizer(model) if style == "chat" else None

    def of(self, problem: Problem) -> str:
        """Return what stands before the answer, as text."""
        if self.tokenizer is None:
            return problem.prompt
        turns = [{"role": "user", "content": problem.question()}]
        asked: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        begin = self.tokenizer.bos_token or ""
        if begin and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]:
            asked = asked.removeprefix(begin)  # the tokenizer puts one there itself
        return asked + problem.reply()
