"""The texts that a sub-model is derived from, and whether a model can take them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from secateur.calibration.packing import CalibrationSet
from secateur.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Texts:
    """What a sub-model is derived from.

    Attributes
    ----------
    calibration
        The text that decides what is pruned.
    recovery
        The text that the pruned model learns from; None when it does not.
    """

    calibration: CalibrationSet
    recovery: CalibrationSet | None

    def check(self, model: PreTrainedModel) -> None:
        """Raise `ConfigError` or `ModelError` for text that the model cannot have been given."""
        _check_tokens(model, self.calibration, "the calibration set")
        if self.recovery is not None:
            _check_tokens(model, self.recovery, "the text for recovery")

    def described(self) -> dict[str, Any]:
        """Return where they come from, as a manifest holds it."""
        texts = {"calibration": self.calibration, "recovery": self.recovery}
        return {name: _described(text) for name, text in texts.items() if text is not None}

    def warn(self, say: Callable[[str], None]) -> None:
        """Say a sentence for each benchmark that a text holds problems of."""
        for what, text in (("calibration", self.calibration), ("recovery", self.recovery)):
            for name, overlap in text.benchmarks.items() if text is not None else ():
                if overlap.held:
                    say(
                        f"warning: the text for {what} holds {overlap.held} of the {overlap.problems} problems of "
                        f"{name}: what a sub-model of it solves there says little of other problems"
                    )


def check_length(model: PreTrainedModel, sequence_length: int) -> None:
    """Raise `ConfigError` for sequences that are longer than the model takes."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise ConfigError(
            f"sequence length {sequence_length} is more than the {longest} tokens that the model takes: "
            "use a shorter --sequence-length"
        )


def _check_tokens(model: PreTrainedModel, text: CalibrationSet, what: str) -> None:
    check_length(model, text.sequence_length)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    lowest, highest = int(text.token_ids.min()), int(text.token_ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise ModelError(
            f"{what} holds token {lowest if lowest < 0 else highest}, the model's vocabulary has "
            f"{vocabulary}: it was made with another tokenizer"
        )


def _described(text: CalibrationSet) -> dict[str, Any]:
    return {
        "sha256": text.sha256,
        "samples": text.samples,
        "sequence_length": text.sequence_length,
        "provenance": [asdict(one) for one in text.provenance],
        "benchmarks": {name: asdict(overlap) for name, overlap in text.benchmarks.items()},
    }
