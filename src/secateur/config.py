"""The recipe: everything that decides what a sub-model is, validated once, frozen, saved with the result.

What only decides how the work is done (threads, device, where the output goes) is no part of it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from secateur.errors import ConfigError

Granularity = Literal["per_output", "per_layer"]
Values = Literal["base", "int8", "int4", "nl4"]
EmbeddingValues = Literal["int8", "int4", "nl4"]
GroupSize = Literal[32, 64, 128]
FOUR_BITS: tuple[Values, ...] = ("int4", "nl4")
# Of the drift of the inputs, for methods that know the parent's: all of it fits the calibration text too closely.
DEFAULT_CORRECTION = 0.5
# Later tokens rest much of their attention on the first one, which is one of hundreds in a sequence.
DEFAULT_FIRST_TOKEN_WEIGHT = 100.0
# Options by what a user asks for, from the cheapest to the one that keeps most; all others and flags win over them.
# Each names whatever another one does, but for its default: so that one given over a recipe file leaves nothing of it.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "wanda", "budget": "uniform"},
    "balanced": {"method": "admm", "correction": 0.0, "budget": "uniform"},
    "best": {"method": "admm", "correction": DEFAULT_CORRECTION, "budget": "measured"},
}
# What a preset's budget becomes where its sparsity only stands for a size.
BY_BYTES = {"measured": "packed"}
DEFAULT_PRESET = "balanced"  # where neither a preset nor a method is named
_ONE_OF_THESE = ("sparsity", "target_size", "keep_quality")  # they decide the same thing
UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3}
DEFAULT_GROUP_SIZES: dict[str, GroupSize] = {"int8": 128, "int4": 64, "nl4": 64}


class Recipe(BaseModel):
    """How a sub-model is derived.

    Attributes
    ----------
    model
        What the base model was called by its user: folder, GGUF file, hub id or `demo`.
    domains
        What the sub-model is for, as `NAME` or `NAME=WEIGHT`; the key is `for` in a recipe file.
    sparsity
        Fraction of the prunable weights that is removed, 0 <= sparsity < 1; with the budget `packed` that whose bytes
        are taken.
    target_size
        Bytes that the sub-model may have at most, also as `300MB` or `1.5GB`; None when the sparsity says it. A recipe
        that is carried out has the sparsity and values instead that were found for it.
    keep_quality
        The share of the parent's quality that is to be kept, 0 < keep_quality < 1, see `secateur.pruning.quality`; None
        when the sparsity or the size is given. Sub-models are derived until one is found, whose recipe has its sparsity
        and values.
    method, budget
        Names from their registries.
    granularity
        The group inside which scores compete: `per_output` (one row of the weight) or `per_layer` (the whole weight).
    samples, sequence_length
        Shape of the calibration set, in sequences and tokens.
    seed
        Decides which text is sampled, and the scores of the method `random`.
    propagate
        Whether a block is calibrated on the outputs of the pruned blocks before it (True) or of the dense ones.
    values
        Precision of the weights that are kept: `base` (the base model's own, exact), `int8`, `int4`, or `nl4`:
        four bits whose levels are not evenly spaced, which lose less.
    group_size
        Input positions that share a scale, for `int8` (128 when None), `int4` and `nl4` (64); None with `base`.
    embedding_values
        Precision of embedding and head where `values` are integers: `int8`, or `int4` or `nl4`, which some models
        hardly feel and others cannot bear.
    eight_bits
        The share of the prunable weights that have eight bits (`int8`, in groups of 128) where `values` have four and
        nothing is removed, 0 <= eight_bits < 1: those of the parts that lose most by four. It is counted in bytes: of
        those that eight bits for all weights would take more.
    trim_vocabulary
        Whether the head computes only the tokens that the domains' text is made of.
    correction
        For `admm`: the share of what has gone wrong before a weight that the weight makes up for; 0 saves the parent's
        passes.
    first_token_weight
        As how many tokens the first one of each sequence counts in a Gram matrix, and in what is measured to share out
        bytes, 1 or more; without effect on what `wanda` removes.
    vocabulary
        How many tokens are kept: those that every text needs and those that the domains need most. The rows of the
        others leave embedding and head, and text that had them is split into more. None keeps all; `auto`, beside
        `target_size`, as many as serve best in a sub-model of that size, whose own recipe has their number.
    recover
        Tokens of text that the pruned model learns from, in whole sequences; 0: it does not.
    recover_for
        The domains of that text, as `domains`, which they are when empty; the key of a recipe file is `recover_for`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, strict=True)

    model: str = "demo"
    domains: Annotated[tuple[str, ...], Field(alias="for", min_length=1)]
    sparsity: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.5
    target_size: Annotated[int | None, Field(ge=1)] = None
    keep_quality: Annotated[float | None, Field(gt=0, lt=1, allow_inf_nan=False)] = None
    method: str
    budget: str = "uniform"
    granularity: Granularity = "per_output"
    samples: Annotated[int, Field(ge=1)] = 128
    sequence_length: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    propagate: bool = True
    values: Values = "base"
    group_size: Annotated[GroupSize | None, Field(validate_default=True)] = None
    embedding_values: EmbeddingValues = "int8"
    eight_bits: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    trim_vocabulary: bool = False
    vocabulary: int | Literal["auto"] | None = None
    recover: Annotated[int, Field(ge=0)] = 0
    recover_for: tuple[str, ...] = ()
    correction: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = DEFAULT_CORRECTION
    first_token_weight: Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)] = DEFAULT_FIRST_TOKEN_WEIGHT

    @field_validator("group_size", mode="after")
    @classmethod
    def _group_size_of_values(cls, value: GroupSize | None, info: ValidationInfo) -> GroupSize | None:
        """Fill in the default, so that a saved recipe says what was done; refuse groups where nothing has a scale."""
        if value is not None and info.data.get("values") == "base":
            raise ValueError("only int8, int4 and nl4 values have groups; leave it out")
        return DEFAULT_GROUP_SIZES.get(info.data.get("values", "")) if value is None else value

    @field_validator("embedding_values", mode="after")
    @classmethod
    def _integers_beside_integers(cls, value: EmbeddingValues, info: ValidationInfo) -> EmbeddingValues:
        """Refuse four bits for an embedding that is to stay the base model's own."""
        is_open = info.data.get("target_size") is not None or info.data.get("keep_quality") is not None
        if value != "int8" and info.data.get("values") == "base" and not is_open:
            raise ValueError(
                "with base values embedding and head are the base model's own; choose int8, int4 or nl4 values"
            )
        return value

    @field_validator("eight_bits", mode="after")
    @classmethod
    def _eight_bits_among_four(cls, value: float, info: ValidationInfo) -> float:
        """Refuse more bits for some weights where the others have no fewer, or where bytes are saved by pruning."""
        is_whole = all(info.data.get(key) is None for key in _ONE_OF_THESE[1:]) and info.data.get("sparsity") == 0
        if value and not (is_whole and info.data.get("values") in FOUR_BITS):
            raise ValueError(
                "eight bits are for some weights among others of int4 or nl4, with sparsity 0; --target-size and "
                "--keep-quality choose the share themselves"
            )
        return value

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _tokens_for_a_size(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what is no number, and to find one where nothing says how much room there is."""
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (value is None or value == "auto" or is_count):
            raise ValueError("give a number of tokens, 1 or more, or auto")
        if value == "auto" and info.data.get("target_size") is None:
            raise ValueError("auto finds out for how many tokens a size has room: give --target-size, or a number")
        return value

    @field_validator("target_size", mode="before")
    @classmethod
    def _size_in_bytes(cls, value: object) -> object:
        """Accept `300MB`, `1.5 GB` and `400000kB`, of a thousand each, and numbers of bytes."""
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?B)\s*", value, re.IGNORECASE)
        if found is None:
            raise ValueError("give a number and a unit, such as 300MB")
        return round(float(found[1]) * UNITS[found[2].lower()])

    @field_validator("recover_for", mode="after")
    @classmethod
    def _text_to_learn_from(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Refuse text for a recovery that does not take place, and beside what is measured on text nobody has seen."""
        if value and not info.data.get("recover"):
            raise ValueError("it is the text of a recovery; say of how many tokens with --recover, or leave it out")
        if value and info.data.get("keep_quality") is not None:
            raise ValueError("--keep-quality measures on text that follows what was learnt from; leave one of them out")
        return value

    @field_validator("domains", "recover_for", mode="before")
    @classmethod
    def _domains_as_strings(cls, value: object) -> object:
        """Accept `python`, `[python, general=0.2]` and `{python: 0.8, general: 0.2}`."""
        if isinstance(value, str):
            return (value,)
        if isinstance(value, Mapping):
            return tuple(f"{name}={weight}" for name, weight in value.items())
        return tuple(value) if isinstance(value, list) else value

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, with the keys of a recipe file; without what was asked for in place of a sparsity."""
        return self.model_dump(mode="json", by_alias=True, exclude={"target_size", "keep_quality"})


def make_recipe(options: Mapping[str, Any], file: Path | None = None) -> Recipe:
    """Build a recipe; an option (not None) wins over the file, that over the default.

    `preset` is an option like any other, whose own options those that are given beside it win over; the recipe holds
    what it stands for. Where neither options nor file name a preset or a method, it is `balanced`.

    Raises
    ------
    ConfigError
        When the file cannot be read or a value is missing, unknown or out of range.
    """
    merged: dict[str, Any] = dict(read_recipe_file(file)) if file is not None else {}
    given = {key: value for key, value in options.items() if value is not None}
    for source in (merged, given):
        if len(named := [key for key in _ONE_OF_THESE if key in source]) > 1:
            raise ConfigError(f"{' and '.join(named)} decide the same thing: give one of them")
    if given.keys() & set(_ONE_OF_THESE):
        merged = {key: value for key, value in merged.items() if key not in _ONE_OF_THESE}
    if merged.get("eight_bits") and _asks_for_other_bits(given):
        del merged["eight_bits"]  # they fill what the file's own sparsity and values have left
    if given.get("recover") == 0 or "keep_quality" in given:
        merged.pop("recover_for", None)  # of the file's own recovery, which there is none of now, or no other text for
    presets = {**_preset(merged), **_preset(given)}
    is_named = "budget" in given or ("budget" in merged and "budget" not in _preset(given))
    merged = {**_preset(merged), **merged, **_preset(given), **given}
    if not is_named and presets.get("budget") in BY_BYTES and merged.keys() & {"target_size", "keep_quality"}:
        merged["budget"] = BY_BYTES[presets["budget"]]
    merged.pop("preset", None)
    if "method" not in merged:
        merged = PRESETS[DEFAULT_PRESET] | merged
    try:
        return Recipe(**merged)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, file)) from None


def _asks_for_other_bits(given: Mapping[str, Any]) -> bool:
    """Return whether options say something beside which the share of eight bits of a recipe file has no meaning."""
    others = given.keys() & set(_ONE_OF_THESE[1:]) or given.get("sparsity")
    return bool(others) or given.get("values", FOUR_BITS[0]) not in FOUR_BITS


def _preset(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the preset among some options stands for; nothing if there is none."""
    name = options.get("preset")
    if name is None:
        return {}
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: known are {', '.join(PRESETS)}")
    return PRESETS[name]


def read_recipe_file(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML recipe; raises `ConfigError` when there is none."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"recipe {str(file)!r} cannot be read: {error.strerror}; name an existing YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(file)!r} is not YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"recipe {str(file)!r} is not a mapping of options, such as `for: python`")
    return content


def _first_problem(error: ValidationError, file: Path | None) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"]) or "recipe"
    where = f" in recipe {str(file)!r}" if file is not None else ""
    if problem["type"] == "extra_forbidden":
        known = ", ".join(["preset", *(field.alias or name for name, field in Recipe.model_fields.items())])
        return f"unknown option {key!r}{where}: known are {known}"
    if problem["type"] == "missing":
        return f"option {key!r} is missing{where}: say what the sub-model is for, such as python"
    received = json.dumps(problem["input"], default=str)
    return f"option {key!r}{where} cannot be {received}: {_plain(problem['msg'])}"


def _plain(message: str) -> str:
    plain = message.removeprefix("Value error, ").replace("tuple", "list")
    return plain[:1].lower() + plain[1:]
