"""The safetensors shards of a sub-model: one for each block, and a last one for everything outside the blocks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.checkpoint.bitmask import SUFFIXES, PackedWeight, stored_suffixes, unpack, unpack_integers
from secateur.checkpoint.format import Encoding, Stored, StoredWeights
from secateur.checkpoint.integers import check_dense, damaged, unpack_dense
from secateur.checkpoint.quantise import Quantised, n_groups, quantise
from secateur.errors import CheckpointError
from secateur.models.safetensors_writer import Lazy, write_safetensors

METADATA = {"format": "pt"}
DENSE_SUFFIXES = ("values", "scales")


def write_block_shard(path: Path, packed: Mapping[str, PackedWeight], others: Mapping[str, Tensor]) -> None:
    """Write the packed weights and the untouched tensors of one block; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, one in packed.items():
        tensors.update(one.tensors(name))
    write_safetensors(path, {**tensors, **others}, METADATA)


def write_outer_shard(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    load: Callable[[str], Tensor],
    dense: StoredWeights,
) -> None:
    """Write the tensors outside the blocks, read one at a time when their turn comes; those of `dense` as integers."""
    lazy: dict[str, Tensor | Lazy] = {}
    for name, (shape, dtype) in shapes.items():
        if name in dense.shapes:
            lazy.update(_quantised(name, dense, load))
        else:
            lazy[name] = Lazy(shape, dtype, partial(load, name))
    write_safetensors(path, lazy, METADATA)


def _quantised(name: str, dense: StoredWeights, load: Callable[[str], Tensor]) -> dict[str, Lazy]:
    """Return values and scales of a dense matrix, made together when the first of them is written."""
    shape, bits, group_size = dense.shapes[name], dense.encoding.bits, dense.encoding.group_size
    made: dict[str, Tensor] = {}

    def take(suffix: str) -> Tensor:
        if not made:
            found = quantise(load(name), None, None, bits=bits, group_size=group_size)
            made.update(values=found.codes, scales=found.scales)
        return made.pop(suffix)

    groups = n_groups(shape[1], group_size)
    return {
        f"{name}.values": Lazy(shape, torch.uint8, partial(take, "values")),
        f"{name}.scales": Lazy((shape[0], groups), torch.bfloat16, partial(take, "scales")),
    }


def read_shard(path: Path, stored: Stored, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of one shard by full name, packed weights unpacked; see `open_shard` and `Shard.floats`."""
    with open_shard(path, stored) as shard:
        return {name: shard.floats(name, dtype) for name in shard.tensors}


@contextmanager
def open_shard(path: Path, stored: Stored) -> Iterator["Shard"]:
    """Yield a shard whose tensors are read one at a time; `stored` is how they are, from `quantization_config`.

    Raises
    ------
    CheckpointError
        When the file cannot be read, or a packed weight is incomplete, damaged or not in `stored`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield Shard(path, file, stored)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"shard {str(path)!r} cannot be read ({error}); derive or fetch it again") from None


class Shard:
    """One open shard.

    Attributes
    ----------
    tensors
        Names of the tensors: those that are stored as they are, then the weights that have parts.
    """

    def __init__(self, path: Path, file: Any, stored: Stored) -> None:
        self._file, self._stored = file, stored
        names = set(file.keys())
        self._parts = _wanted(path, names, stored)
        parts = {f"{name}.{suffix}" for name, suffixes in self._parts.items() for suffix in suffixes}
        self.tensors = (*sorted(names - parts), *self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, unpacked."""
        if name not in self._parts:
            return tuple(self._file.get_slice(name).get_shape())
        return {**self._stored.pruned.shapes, **self._stored.dense.shapes}[name]

    def encoding(self, name: str) -> Encoding | None:
        """Return how a tensor is stored as integers; None if it is not."""
        return _integers(name, self._stored)

    def float_type(self, name: str) -> str:
        """Return how safetensors calls the type of a tensor that is not stored as integers, `BF16` for one."""
        return str(self._file.get_slice(f"{name}.values" if name in self._parts else name).get_dtype())

    def floats(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor, unpacked; `dtype` is for weights that are stored as integers, others keep their own."""
        if name not in self._parts:
            tensor: Tensor = self._file.get_tensor(name).clone()
            return tensor
        return unpack_parts(name, self._read(name), self._stored, dtype)

    def integers(self, name: str) -> Quantised:
        """Return a weight for which `encoding` is not None; what was removed has the code of 0."""
        parts, dense = self._read(name), self._stored.dense
        if name in dense.shapes:
            quantised = Quantised(parts["values"], parts["scales"])
            check_dense(quantised, dense.shapes[name], name, dense.encoding)
            return quantised
        pruned = self._stored.pruned
        return unpack_integers(PackedWeight(**parts), pruned.shapes[name], name, pruned.encoding)[0]

    def _read(self, name: str) -> dict[str, Tensor]:
        return {suffix: self._file.get_tensor(f"{name}.{suffix}") for suffix in self._parts[name]}


def _wanted(path: Path, names: set[str], stored: Stored) -> dict[str, tuple[str, ...]]:
    """Return the suffixes of each weight of a shard that has parts; raises where they are not those of the config."""
    parts = {name for name in names if name.rpartition(".")[2] in SUFFIXES}
    wanted = {name: _suffixes(name, stored) for name in sorted({name.rpartition(".")[0] for name in parts})}
    expected = {f"{name}.{suffix}" for name, suffixes in wanted.items() for suffix in suffixes}
    for problem, wrong in (("lacks", expected - names), ("holds what config.json does not tell of,", parts - expected)):
        if wrong:
            raise CheckpointError(f"shard {str(path)!r} {problem} {min(wrong)!r}; derive or fetch the sub-model again")
    return wanted


def _suffixes(name: str, stored: Stored) -> tuple[str, ...]:
    """Return the suffixes of the tensors of a weight that is not stored as it is; none for one that is not known."""
    if name in stored.dense.shapes:
        return DENSE_SUFFIXES
    return stored_suffixes(stored.pruned.encoding) if name in stored.pruned.shapes else ()


def _integers(name: str, stored: Stored) -> Encoding | None:
    """Return the encoding of a weight that is stored as integers; None for all others."""
    found = next((one for one in (stored.dense, stored.pruned) if name in one.shapes), None)
    return found.encoding if found is not None and found.encoding.bits else None


def unpack_parts(name: str, parts: Mapping[str, Tensor], stored: Stored, dtype: torch.dtype) -> Tensor:
    """Return a weight [out_features, in_features] from its parts by suffix.

    Raises
    ------
    CheckpointError
        When a part is missing or too many, or the parts are damaged.
    """
    if parts.keys() != set(_suffixes(name, stored)):
        raise damaged(name, f"it has the parts {', '.join(sorted(parts))}")
    if name in stored.dense.shapes:
        quantised = Quantised(parts["values"], parts["scales"])
        return unpack_dense(quantised, stored.dense.shapes[name], name, stored.dense.encoding, dtype)
    weight, _mask = unpack(PackedWeight(**parts), stored.pruned.shapes[name], name, stored.pruned.encoding, dtype)
    return weight
