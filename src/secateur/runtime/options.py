"""How text is generated: the options, checked once, that every way to run a model understands alike.

Only what is asked for here changes the model's distribution: penalties and temperatures that a `generation_config`
carries are not applied; of that file only the end-of-sequence tokens count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from secateur.errors import ConfigError

# What lies beyond has no use, and float32, in which tokens are chosen, would make zeros and infinities of it.
LOWEST_TEMPERATURE = 1e-4
LOWEST_TOP_P = 1e-6
PENALTIES = (1e-3, 1e3)
_LARGEST = 1e30


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated; refuses values that cannot be used with `ConfigError`.

    Attributes
    ----------
    max_new_tokens
        Upper bound on the tokens generated, at least 1.
    temperature
        0 takes the most likely token; otherwise logits are divided by it before a token is drawn, and it is at least
        1e-4: with less nothing but the most likely token is drawn, and logits overflow.
    top_k
        Draw among the `top_k` most likely tokens; 0 means all.
    top_p
        Draw among the fewest most likely tokens whose probabilities sum to `top_p`, 1e-6 <= top_p <= 1 (Holtzman et
        al. 2020). Applied after temperature and `top_k`.
    min_p
        Draw only among tokens that are at least `min_p` times as likely as the likeliest, 0 <= min_p < 1 (Nguyen et al.
        2024). Applied last.
    repetition_penalty
        Divides the logits above 0 of tokens that occur in prompt or answer, and multiplies those below 0 (Keskar et al.
        2019); 1 means no penalty, and 0.001 to 1,000 are possible. Applied first.
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
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # a string is a sequence of one-letter stops to Python, to nobody else
            object.__setattr__(self, "stop", (self.stop,))
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (self.temperature == 0 or LOWEST_TEMPERATURE <= self.temperature <= _LARGEST):
            raise ConfigError(
                f"temperature is {self.temperature}; it must be 0 (most likely token), or lie in "
                f"{LOWEST_TEMPERATURE} to {_LARGEST}"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not LOWEST_TOP_P <= self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be at least {LOWEST_TOP_P} and at most 1 (all tokens)")
        if not 0 <= self.min_p < 1:
            raise ConfigError(f"min_p is {self.min_p}; it must be 0 (all tokens) or more, and below 1")
        lowest, highest = PENALTIES
        if not lowest <= self.repetition_penalty <= highest:
            raise ConfigError(
                f"repetition_penalty is {self.repetition_penalty}; it must lie in {lowest} to {highest} (1 is none)"
            )
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more, and below 2^64")
        if "" in self.stop:
            raise ConfigError("an empty stop string would stop every text before its first character; leave it out")

    def of_text(self, index: int) -> "GenerationOptions":
        """Return the options of one text of a batch: it draws as one that is generated alone with `seed + index`."""
        return self if self.seed is None else replace(self, seed=(self.seed + index) % 2**64)


def make_options(values: Mapping[str, Any]) -> GenerationOptions:
    """Return checked options; raises `ConfigError` for a value that cannot be used and `TypeError` for a name."""
    known = [field.name for field in fields(GenerationOptions)]
    if unknown := sorted(values.keys() - set(known)):
        raise TypeError(f"unknown option {unknown[0]!r}: known are {', '.join(known)}")
    return GenerationOptions(**values)
