"""The names and the JSON of a sub-model folder: which files it has and what they say about themselves.

Every string and number in these files is untrusted when it is read.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


def quantization_config(shapes: Mapping[str, tuple[int, int]], values: str) -> dict[str, Any]:
    """Return what transformers reads from config.json: the format, and the shape of each packed weight."""
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "version": VERSION,
        "layout": LAYOUT,
        "values": values,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
    }


def check_quantization_config(raw: object) -> dict[str, tuple[int, int]]:
    """Return the shapes of the packed weights; raises `CheckpointError` when this version cannot read the format."""
    if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
        raise CheckpointError("config.json has no quantization_config of secateur; this is no sub-model")
    for key, known in (("format", FORMAT), ("version", VERSION), ("layout", LAYOUT)):
        if raw.get(key) != known:
            raise CheckpointError(
                f"the sub-model has {key} {raw.get(key)!r}, this version of secateur reads {known!r}; "
                "a newer secateur may read it"
            )
    shapes = raw.get("shapes")
    if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
        raise CheckpointError("config.json does not give the shapes of the packed weights; fetch the sub-model again")
    return {str(name): (shape[0], shape[1]) for name, shape in shapes.items()}


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
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON ({error}); derive or fetch the sub-model again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds no JSON object; derive or fetch the sub-model again")
    return content
