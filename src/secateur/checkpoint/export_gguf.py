"""A sub-model as one GGUF file, which llama.cpp and what is built on it run.

GGUF has no sparse format: removed weights are zeros that take as much room as all others. But its Q8_0 and Q4_0 hold
exactly what int8 and int4 of a sub-model hold, numbers and scales, and IQ4_NL what nl4 holds where nothing was removed
(Q8_0 where something was), so nothing is quantised twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from secateur.checkpoint.format import Encoding, Stored
from secateur.checkpoint.gguf_blocks import BLOCK, from_floats, from_integers
from secateur.checkpoint.opened import OpenedSubModel
from secateur.checkpoint.quantise import Quantised
from secateur.checkpoint.shards import open_shard
from secateur.errors import CheckpointError, ConfigError, OutputError
from secateur.files import new_file
from secateur.models.gguf_file import Value
from secateur.models.gguf_keys import WRITTEN, full_config, model_metadata, rope_factors
from secateur.models.gguf_names import HEAD_NAME, ROPE_FACTORS, Source, redo, tensor_sources
from secateur.models.gguf_vocabulary import vocabulary_metadata
from secateur.models.gguf_writer import LazyBlocks, write_gguf
from secateur.models.safetensors_writer import DTYPE_CODES
from secateur.registry import Registry

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
Q8_0, Q4_0, IQ4_NL = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.IQ4_NL
# What holds integers of a sub-model exactly.
_OF_VALUES = {"int8": Q8_0, "int4": Q4_0, "nl4": IQ4_NL}

# What a user can ask for. Four bits are not among them: rounding to them without more thought costs too much.
TYPES: Registry[GGMLQuantizationType] = Registry("GGUF type")
for _kind in (F32, F16, BF16, Q8_0):
    TYPES.add(_kind.name.lower(), _kind)

_FLOATS = {"BF16": BF16, "F16": F16, "F32": F32}
_FILE_TYPES = {
    F32: LlamaFileType.ALL_F32,
    F16: LlamaFileType.MOSTLY_F16,
    BF16: LlamaFileType.MOSTLY_BF16,
    Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Q4_0: LlamaFileType.MOSTLY_Q4_0,
    IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
}
_QUANTIZATION_VERSION = 2  # of the layout of blocks


@dataclass(frozen=True)
class _Held:
    """A tensor of a shard.

    Attributes
    ----------
    shard
        The file it is in.
    shape
        Unpacked.
    encoding
        How it is stored as integers; None if it is not.
    floats
        The type of its floats; for integers that of the base model.
    whole
        Whether nothing was removed.
    """

    shard: Path
    shape: tuple[int, ...]
    encoding: Encoding | None
    floats: GGMLQuantizationType
    whole: bool

    def exact(self) -> GGMLQuantizationType:
        """Return the type that holds the stored values as they are; no level of IQ4_NL is 0, as removed weights are."""
        if self.encoding is None:
            return self.floats
        kind = _OF_VALUES[self.encoding.values]
        return Q8_0 if kind == IQ4_NL and not self.whole else kind

    def kind(self, wanted: GGMLQuantizationType | None) -> GGMLQuantizationType:
        """Return the type in the file: what was asked for, or what holds the stored values exactly."""
        if len(self.shape) == 1:
            return F32  # llama.cpp takes norms and biases in nothing else
        if wanted is None:
            wanted = self.exact()
        return self.floats if wanted in _OF_VALUES.values() and self.shape[-1] % BLOCK else wanted


def export_gguf(submodel: OpenedSubModel, target: Path, kind: str | None) -> None:
    """Write a sub-model to the file `target`.

    Parameters
    ----------
    submodel
        Of a family in `models.gguf_keys.WRITTEN`.
    target
        A name that ends in `.gguf`; nothing must exist there.
    kind
        A name from `TYPES`. None takes for each matrix the type that holds its values exactly: BF16, F16 or F32 for
        floats, Q8_0 for int8, Q4_0 for int4, IQ4_NL for nl4 (Q8_0 where weights were removed). Matrices whose rows
        are no multiple of 32, which these need, get the base model's precision instead; norms and biases are float32
        always.

    Raises
    ------
    UnknownNameError, ConfigError, CheckpointError, ModelError, OutputError
    """
    if kind in ("q4_0", "iq4_nl"):
        raise ConfigError(f"no values are rounded to {kind} here; without --type int4 values become Q4_0 as they are")
    wanted = None if kind is None else TYPES.get(kind)
    if target.suffix.lower() != ".gguf":
        raise OutputError(f"{target} is not the name of a GGUF file; write one that ends in .gguf, {target.name}.gguf")
    with new_file(target) as path:
        config = full_config(submodel.config)
        architecture = WRITTEN[config["model_type"]]
        held = _held(submodel)
        # transformers does not tie a head that lies in the files beside the embedding.
        config["tie_word_embeddings"] = config["tie_word_embeddings"] and HEAD_NAME not in held
        sources = tensor_sources(architecture, config)
        _check(held, sources)
        tensors = {}
        for name, one in held.items():
            order = partial(redo, change=sources[name].change, config=config)
            load = partial(_load, submodel.stored, name, one, one.kind(wanted), order)
            tensors[sources[name].name] = LazyBlocks(one.shape, one.kind(wanted), load)
        if (factors := rope_factors(config)) is not None:
            tensors[ROPE_FACTORS] = LazyBlocks(factors.shape, F32, lambda: factors)
        metadata = {
            **model_metadata(config, _name(submodel.manifest)),
            **_file_type(held, wanted),
            **vocabulary_metadata(submodel.path, config, architecture),
        }
        write_gguf(path, architecture, metadata, tensors)


def _held(submodel: OpenedSubModel) -> dict[str, _Held]:
    """Return every tensor of the shards, without reading its values."""
    held: dict[str, _Held] = {}
    for name in submodel.shards:
        path = submodel.path / name
        with open_shard(path, submodel.stored) as shard:
            for tensor in shard.tensors:
                encoding, whole = shard.encoding(tensor), submodel.stored.whole(tensor) is not None
                floats = DTYPE_CODES[submodel.dtype] if encoding else shard.float_type(tensor)
                if floats not in _FLOATS:
                    raise CheckpointError(f"tensor {tensor!r} is of type {floats}, which is no weight; fetch it again")
                held[tensor] = _Held(path, shard.shape(tensor), encoding, _FLOATS[floats], whole)
    submodel.check_complete(held)
    return held


def _check(held: Mapping[str, _Held], sources: Mapping[str, Source]) -> None:
    """Refuse shards that lack a tensor of the model, have one of another shape, or one that is not the model's."""
    if wrong := sorted(held.keys() ^ sources.keys()):
        problem = "lack" if wrong[0] in sources else "hold, beside the model that config.json describes,"
        raise CheckpointError(f"the shards {problem} {wrong[0]!r}; derive or fetch the sub-model again")
    for name, one in held.items():
        if one.shape != sources[name].shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(one.shape)} where config.json asks for {list(sources[name].shape)}; "
                "derive or fetch the sub-model again"
            )


def _load(
    stored: Stored, name: str, held: _Held, kind: GGMLQuantizationType, order: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """Return the bytes of a tensor in the file; `order` puts rows in the file's order."""
    with open_shard(held.shard, stored) as shard:
        if held.encoding is not None and kind in (held.exact(), Q8_0):
            found = shard.integers(name)
            return from_integers(Quantised(order(found.codes), order(found.scales)), held.encoding, kind, name)
        return from_floats(order(shard.floats(name)), kind, name)


def _file_type(held: Mapping[str, _Held], wanted: GGMLQuantizationType | None) -> dict[str, Value]:
    """Return the keys that say of what type most of the weights are."""
    sizes: dict[GGMLQuantizationType, int] = {}
    for one in held.values():
        sizes[one.kind(wanted)] = sizes.get(one.kind(wanted), 0) + prod(one.shape)
    most = max(sizes, key=lambda kind: sizes[kind])
    return {"general.file_type": int(_FILE_TYPES[most]), "general.quantization_version": _QUANTIZATION_VERSION}


def _name(manifest: Mapping[str, Any]) -> str:
    """Return what the sub-model's base was called, without the folders before it."""
    return str(manifest["base_model"].get("name")).rstrip("/").rpartition("/")[2].removesuffix(".gguf")
