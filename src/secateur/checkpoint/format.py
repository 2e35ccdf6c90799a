"""The names and the JSON of a sub-model folder: which files it has and what they say about themselves.

Every string and number in these files is untrusted when it is read. Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from secateur.config import GroupSize
from secateur.errors import CheckpointError

QUANT_METHOD = "secateur"
FORMAT, VERSION, LAYOUT = "bitmask", 1, "rows"
MANIFEST = "secateur.json"
LOG = "derivation.log.json"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
STATE = "derivation.state.json"
ACTIVATIONS = "activations.bin"
LOCK = "derivation.lock"
# The manifest cannot hold its own hash; the others tell how the work went, or exist only while it goes on.
NOT_HASHED = (MANIFEST, LOG, STATE, ACTIVATIONS, LOCK)

FLOAT_VALUES = ("bf16", "fp16", "fp32")
INTEGER_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Encoding:
    """How the entries of a weight are stored.

    Attributes
    ----------
    values
        `int8`, `int4`, or the floats of the base model: `bf16`, `fp16`, `fp32`, joined with `+` where it mixes them.
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
# Embedding and head of a sub-model whose other weights are integers.
DENSE_ENCODING = Encoding("int8", 128)


@dataclass(frozen=True)
class StoredWeights:
    """Weights that are stored alike: their encoding, and [out_features, in_features] of each by name."""

    encoding: Encoding
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """What `quantization_config` says of the tensors in the shards; those not named are stored as they are.

    Attributes
    ----------
    pruned
        Weights with a bitmask.
    dense
        Weights without one, as integers: embedding and head.
    """

    pruned: StoredWeights
    dense: StoredWeights = field(default_factory=lambda: StoredWeights(DENSE_ENCODING))


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
    dense = {"dense": _describe(stored.dense)} if stored.dense.shapes else {}
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "version": VERSION,
        "layout": LAYOUT,
        **_describe(stored.pruned),
        **dense,
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
    for key, known in (("format", FORMAT), ("version", VERSION), ("layout", LAYOUT)):
        if raw.get(key) != known:
            raise _foreign(key, raw.get(key), repr(known))
    stored = Stored(_stored_weights(raw))
    if "dense" not in raw:
        return stored
    dense = raw["dense"]
    if not isinstance(dense, dict) or dense.get("values") != DENSE_ENCODING.values:
        raise _foreign("dense", dense, "matrices whose values are int8")
    weights = _stored_weights(dense)
    if both := sorted(weights.shapes.keys() & stored.pruned.shapes.keys()):
        raise CheckpointError(f"config.json names {both[0]!r} twice, pruned and dense; fetch the sub-model again")
    return Stored(stored.pruned, weights)


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
