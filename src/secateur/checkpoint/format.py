"""The names and the JSON of a sub-model folder: which files it has and what they say about themselves.

Every string and number in these files is untrusted when it is read. Imports no torch.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from secateur.config import GroupSize
from secateur.errors import CheckpointError

QUANT_METHOD = "secateur"
FORMAT, LAYOUT = "bitmask", "rows"
# A file says the lowest version that describes it: only what has unmasked weights, a shortlist,
# or a dense matrix that is not int8 needs the second, only what has nl4 the third, and only what has eight bits among
# four the fourth.
VERSIONS = (1, 2, 3, 4)
_OF_THIRD, _OF_FOURTH = "nl4", "eight_bits"
MANIFEST = "secateur.json"
LOG = "derivation.log.json"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
STATE = "derivation.state.json"
ACTIVATIONS = "activations.bin"
PARENT_ACTIVATIONS = "activations-parent.bin"
# Of a derivation with recovery: the folder of its pruned shards, and the state of what it has learnt.
PRUNED = "pruned"
PRUNED_WHOLE = f"{PRUNED}/whole"  # an empty file, there once all shards are
RECOVERY = "recovery.state"
BUDGET = "budget.json"  # of a derivation that measures what parts of the model are worth: what was found
LOCK = "derivation.lock"
# The manifest cannot hold its own hash; the others tell how the work went, or exist only while it goes on.
NOT_HASHED = (MANIFEST, LOG, STATE, ACTIVATIONS, PARENT_ACTIVATIONS, PRUNED, RECOVERY, BUDGET, LOCK)

FLOAT_VALUES = ("bf16", "fp16", "fp32")
INTEGER_BITS = {"int8": 8, "int4": 4, "nl4": 4}


@dataclass(frozen=True)
class Encoding:
    """How the entries of a weight are stored.

    Attributes
    ----------
    values
        `int8`, `int4`, `nl4`, or the floats of the base model: `bf16`, `fp16`, `fp32`, joined with `+` where there
        are several.
    group_size
        Consecutive input positions that share a scale; 0 for floats, which have none.
    """

    values: str
    group_size: int = 0

    @property
    def bits(self) -> int:
        """Bits of an integer code; 0 for floats."""
        return INTEGER_BITS.get(self.values, 0)


FLOATS = Encoding("+".join(FLOAT_VALUES))
# Embedding and head of a sub-model whose other weights are integers, by what they are asked to be.
DENSE_ENCODINGS = {"int8": Encoding("int8", 128), "int4": Encoding("int4", 32), "nl4": Encoding("nl4", 32)}
DENSE_ENCODING = DENSE_ENCODINGS["int8"]  # of all in version 1
EIGHT_BIT_ENCODING = Encoding("int8", 128)  # of prunable weights among others that have four bits


@dataclass(frozen=True)
class StoredWeights:
    """Weights that are stored alike: their encoding, and [out_features, in_features] of each by name."""

    encoding: Encoding
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrimmedHead:
    """The matrix of `dense` whose rows are reordered, and of how many tokens the logits are computed.

    Its first `tokens` rows are those of the shortlist, in the order of their ids; all others follow, in theirs.
    """

    weight: str
    tokens: int


@dataclass(frozen=True)
class Stored:
    """What `quantization_config` says of the tensors in the shards; those not named are stored as they are.

    Attributes
    ----------
    pruned
        The prunable weights.
    dense
        Matrices outside the blocks that are not stored as they are: embedding and head, as integers or reordered.
    unmasked
        Those of `pruned` that lose no entry, and have no bitmask.
    eight_bits
        Those of `unmasked` that are stored as `EIGHT_BIT_ENCODING`, where all others have four bits.
    shortlist
        None when the head computes the logits of all tokens.
    """

    pruned: StoredWeights
    dense: StoredWeights = field(default_factory=lambda: StoredWeights(DENSE_ENCODING))
    unmasked: frozenset[str] = frozenset()
    shortlist: TrimmedHead | None = None
    eight_bits: frozenset[str] = frozenset()

    def whole(self, name: str) -> StoredWeights | None:
        """Return what a weight without a bitmask belongs to, with its encoding; None for any other."""
        if name in self.dense.shapes:
            return self.dense
        if name in self.eight_bits:
            return StoredWeights(EIGHT_BIT_ENCODING, {name: self.pruned.shapes[name]})
        return self.pruned if name in self.unmasked else None

    def packed(self, name: str) -> StoredWeights | None:
        """Return what a weight belongs to that is not stored as it is, with or without a bitmask; None for others."""
        return self.whole(name) or (self.pruned if name in self.pruned.shapes else None)

    def encoding_of(self, name: str) -> Encoding | None:
        """Return how a tensor is stored as integers; None if it is not."""
        packed = self.packed(name)
        return packed.encoding if packed is not None and packed.encoding.bits else None

    def share_in_eight_bits(self) -> float:
        """Return the share of the entries of `pruned` that `eight_bits` has."""
        entries = {name: rows * columns for name, (rows, columns) in self.pruned.shapes.items()}
        return sum(entries[name] for name in self.eight_bits) / max(1, sum(entries.values()))

    def refuse_twice(self, names: Collection[str]) -> None:
        """Raise `CheckpointError` when tensors of these names hold a weight in parts and as it is.

        Not every reader would take the same one.
        """
        for name in (*self.pruned.shapes, *self.dense.shapes):
            if name in names and f"{name}.values" in names:
                raise CheckpointError(f"weight {name!r} is stored twice, packed and as it is; derive or fetch it again")


@dataclass(frozen=True)
class LayerRecord:
    """One pruned weight: its qualified name, shape [out_features, in_features] and number of kept entries."""

    name: str
    shape: tuple[int, int]
    kept: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of the entries that was removed."""
        return 1 - self.kept / self.size

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "shape": list(self.shape), "sparsity": round(self.sparsity, 6)}


def shard_name(number: int, total: int) -> str:
    """Return the file name of shard `number`, counted from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def quantization_config(stored: Stored) -> dict[str, Any]:
    """Return what transformers reads from config.json: the format, and the shape of each packed weight."""
    extensions: dict[str, Any] = {}
    if stored.unmasked:
        extensions["unmasked"] = [name for name in stored.pruned.shapes if name in stored.unmasked]
    if stored.shortlist is not None:
        extensions["shortlist"] = asdict(stored.shortlist)
    if stored.eight_bits:
        extensions[_OF_FOURTH] = [name for name in stored.pruned.shapes if name in stored.eight_bits]
    dense = {"dense": _describe(stored.dense)} if stored.dense.shapes else {}
    second = extensions or (dense and stored.dense.encoding.values == "int4")
    third = _OF_THIRD in (stored.pruned.encoding.values, stored.dense.encoding.values if dense else "")
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "version": VERSIONS[3 if stored.eight_bits else 2 if third else 1 if second else 0],
        "layout": LAYOUT,
        **_describe(stored.pruned),
        **dense,
        **extensions,
    }


def _describe(weights: StoredWeights) -> dict[str, Any]:
    encoding = weights.encoding
    groups = {"group_size": encoding.group_size} if encoding.bits else {}
    shapes = {name: list(shape) for name, shape in weights.shapes.items()}
    return {"values": encoding.values, **groups, "shapes": shapes}


def check_quantization_config(raw: object) -> Stored:
    """Return how weights are stored; raises `CheckpointError` when this version cannot read the format."""
    if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
        raise CheckpointError("config.json has no quantization_config of secateur; this is no sub-model")
    for key, known in (("format", (FORMAT,)), ("version", VERSIONS), ("layout", (LAYOUT,))):
        if raw.get(key) not in known or isinstance(raw[key], bool | float):
            raise _foreign(key, raw.get(key), " or ".join(map(repr, known)))
    pruned, dense = _stored_weights(raw), StoredWeights(DENSE_ENCODING)
    if "dense" in raw:
        dense = _dense_weights(raw["dense"], raw["version"])
    if raw["version"] < VERSIONS[2] and _OF_THIRD in (pruned.encoding.values, dense.encoding.values):
        raise _foreign("values in an earlier version", _OF_THIRD, f"them in version {VERSIONS[2]}")
    if both := sorted(dense.shapes.keys() & pruned.shapes.keys()):
        raise CheckpointError(f"config.json names {both[0]!r} twice, pruned and dense; fetch the sub-model again")
    if raw["version"] == VERSIONS[0] and (wrong := sorted({"unmasked", "shortlist"} & raw.keys())):
        raise _foreign(f"{wrong[0]} in version 1", raw[wrong[0]], "it in version 2")
    if raw["version"] < VERSIONS[3] and _OF_FOURTH in raw:
        raise _foreign(f"{_OF_FOURTH} in an earlier version", raw[_OF_FOURTH], f"it in version {VERSIONS[3]}")
    unmasked = _unmasked(raw.get("unmasked", []), pruned)
    eight_bits = _eight_bits(raw.get(_OF_FOURTH, []), pruned, unmasked)
    return Stored(pruned, dense, unmasked, _trimmed(raw.get("shortlist"), dense), eight_bits)


def _dense_weights(dense: object, version: int) -> StoredWeights:
    known = (DENSE_ENCODING.values,) if version == VERSIONS[0] else (*DENSE_ENCODINGS, *FLOAT_VALUES)
    if not isinstance(dense, dict) or dense.get("values") not in known:
        raise _foreign("dense", dense, f"matrices whose values are {' or '.join(known)}")
    return _stored_weights(dense)


def _unmasked(names: object, pruned: StoredWeights) -> frozenset[str]:
    known = isinstance(names, list) and all(isinstance(name, str) and name in pruned.shapes for name in names)
    if not isinstance(names, list) or not known or (names and not pruned.encoding.bits):
        raise _foreign("unmasked", names, "names of its weights, where these are integers")
    return frozenset(names)


def _eight_bits(names: object, pruned: StoredWeights, unmasked: frozenset[str]) -> frozenset[str]:
    known = isinstance(names, list) and all(isinstance(name, str) and name in unmasked for name in names)
    if not isinstance(names, list) or not known or (names and pruned.encoding.bits != 4):
        raise _foreign(_OF_FOURTH, names, "names of weights without a bitmask, where the others have four bits")
    return frozenset(names)


def _trimmed(shortlist: object, dense: StoredWeights) -> TrimmedHead | None:
    if shortlist is None:
        return None
    weight, tokens = (shortlist.get(key) for key in ("weight", "tokens")) if isinstance(shortlist, dict) else (None, 0)
    shape = dense.shapes.get(weight) if isinstance(weight, str) else None
    if not isinstance(weight, str) or shape is None or type(tokens) is not int or not 0 < tokens <= shape[0]:
        raise _foreign("shortlist", shortlist, "the name of a dense matrix and a number of its rows")
    return TrimmedHead(weight, tokens)


def _stored_weights(raw: Mapping[str, Any]) -> StoredWeights:
    values, group_size, shapes = raw.get("values"), raw.get("group_size"), raw.get("shapes")
    if not isinstance(values, str) or not (values in INTEGER_BITS or set(values.split("+")) <= set(FLOAT_VALUES)):
        raise _foreign("values", values, f"{', '.join((*INTEGER_BITS, *FLOAT_VALUES))}")
    allowed = get_args(GroupSize) if values in INTEGER_BITS else (None,)
    if group_size not in allowed or isinstance(group_size, bool | float):
        raise _foreign(f"{values} values with group_size", group_size, " or ".join(map(str, allowed)))
    if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
        raise CheckpointError("config.json does not give the shapes of the packed weights; fetch the sub-model again")
    by_name = {str(name): (shape[0], shape[1]) for name, shape in shapes.items()}
    return StoredWeights(Encoding(values, group_size or 0), by_name)


def _foreign(what: str, received: object, known: str) -> CheckpointError:
    text = repr(received)
    return CheckpointError(
        f"the sub-model has {what} {text if len(text) <= 80 else text[:77] + '...'}, this version of secateur reads "
        f"{known}; a newer secateur may read it"
    )


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and 0 < n < 2**31 for n in value)


def dump_json(content: Mapping[str, Any]) -> bytes:
    """Return JSON that does not depend on anything but its content."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object of a sub-model folder; raises `CheckpointError` when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}; name a sub-model folder") from None
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: Python limits the digits of a number
        raise CheckpointError(f"{str(path)!r} is not JSON ({error}); derive or fetch the sub-model again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds no JSON object; derive or fetch the sub-model again")
    return content


def describe_difference(key: str, old: Any, new: Any) -> str:
    """Name the first differing entry of two plain JSON values, for an error message."""
    if isinstance(old, dict) and isinstance(new, dict):
        for inner in (*new, *old):
            if old.get(inner) != new.get(inner):
                return describe_difference(f"{key} ({inner})", old.get(inner), new.get(inner))
    return f"{key}, {_short(old)} instead of {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
