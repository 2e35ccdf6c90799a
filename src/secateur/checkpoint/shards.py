"""The safetensors shards of a sub-model: one for each block, and a last one for everything outside the blocks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.checkpoint import bitmask, dense, shortlist
from secateur.checkpoint.bitmask import PackedWeight, unpack, unpack_integers
from secateur.checkpoint.dense import DenseWeight, pack_dense, stored_width, unpack_dense, unpack_dense_integers
from secateur.checkpoint.format import Encoding, Stored, check_quantization_config, read_json
from secateur.checkpoint.integers import damaged
from secateur.checkpoint.quantise import Quantised, n_groups, quantise
from secateur.checkpoint.shortlist import Shortlist, checked_shortlist
from secateur.errors import CheckpointError
from secateur.models.safetensors_writer import Lazy, write_safetensors

METADATA = {"format": "pt"}
# What the parts of a weight end in that is not stored as it is.
PART_SUFFIXES = (*bitmask.SUFFIXES, shortlist.SUFFIX)


def write_block_shard(
    path: Path, packed: Mapping[str, PackedWeight | DenseWeight], others: Mapping[str, Tensor]
) -> None:
    """Write the packed weights and the untouched tensors of one block; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, one in packed.items():
        tensors.update(one.tensors(name))
    write_safetensors(path, {**tensors, **others}, METADATA)


def write_outer_shard(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    load: Callable[[str], Tensor],
    stored: Stored,
    tokens: Shortlist | None = None,
) -> None:
    """Write the tensors outside the blocks, read one at a time when their turn comes.

    Those of `stored.dense` are written as it says, the one that `stored.shortlist` names in the order of `tokens`.
    """
    lazy: dict[str, Tensor | Lazy] = {}
    for name, (shape, dtype) in shapes.items():
        if name in stored.dense.shapes:
            trimmed = tokens if stored.shortlist is not None and stored.shortlist.weight == name else None
            lazy.update(_dense_parts(name, dtype, stored, load, trimmed))
        else:
            lazy[name] = Lazy(shape, dtype, partial(load, name))
    write_safetensors(path, lazy, METADATA)


def _dense_parts(
    name: str, dtype: torch.dtype, stored: Stored, load: Callable[[str], Tensor], tokens: Shortlist | None
) -> dict[str, Tensor | Lazy]:
    """Return the parts of a dense matrix, made together when the first of them is written."""
    encoding, (rows, columns) = stored.dense.encoding, stored.dense.shapes[name]
    made: dict[str, Tensor] = {}

    def take(part: str) -> Tensor:
        if not made:
            weight = _encoded(load(name), encoding)
            made.update(
                (weight if tokens is None else weight.take_rows(torch.from_numpy(tokens.order()))).tensors(name)
            )
        return made.pop(part)

    kinds = {
        "values": ((rows, stored_width(columns, encoding)), torch.uint8 if encoding.bits else dtype),
        "scales": ((rows, n_groups(columns, encoding.group_size or 1)), torch.bfloat16),
    }
    parts = {f"{name}.{suffix}": kinds[suffix] for suffix in dense.stored_suffixes(encoding)}
    lazy: dict[str, Tensor | Lazy] = {part: Lazy(*kind, partial(take, part)) for part, kind in parts.items()}
    if tokens is not None:
        lazy[f"{name}.{shortlist.SUFFIX}"] = torch.from_numpy(tokens.tokens)
    return lazy


def _encoded(weight: Tensor, encoding: Encoding) -> DenseWeight:
    if not encoding.bits:
        return DenseWeight(weight)
    return pack_dense(quantise(weight, None, None, values=encoding.values, group_size=encoding.group_size), encoding)


def read_shard(path: Path, stored: Stored, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of one shard by full name, packed weights unpacked; see `open_shard` and `Shard.floats`."""
    with open_shard(path, stored) as shard:
        return {name: shard.floats(name, dtype) for name in shard.tensors}


def check_shard(path: Path, stored: Stored) -> None:
    """Read one shard, a tensor at a time, as it is stored; raises `CheckpointError` for what `Shard` cannot read.

    Of floats only that they are there is known then: any bytes are some.
    """
    with open_shard(path, stored) as shard:
        for name in shard.tensors:
            if shard.encoding(name) is None:
                shard.shape(name)
            else:
                shard.integers(name)


@contextmanager
def open_shard(path: Path, stored: Stored) -> Iterator["Shard"]:
    """Yield a shard whose tensors are read one at a time; `stored` is how they are, from `quantization_config`.

    Raises
    ------
    CheckpointError
        When the file cannot be read, or a packed weight is incomplete, damaged or not in `stored`.
    """
    with _opened(path) as file:
        yield Shard(path, file, stored)


def read_shortlist(folder: Path) -> Shortlist | None:
    """Return the tokens that the head of a sub-model computes; None when it computes all.

    Raises
    ------
    CheckpointError
        When a file is missing or cannot be read, or the shortlist is damaged.
    """
    stored = check_quantization_config(read_json(folder / "config.json").get("quantization_config"))
    if stored.shortlist is None:
        return None
    name, count = stored.shortlist.weight, stored.shortlist.tokens
    key = f"{name}.{shortlist.SUFFIX}"
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as file:
            if key in file.keys():  # noqa: SIM118 - not a mapping
                return checked_shortlist(file.get_tensor(key).numpy(), count, stored.dense.shapes[name][0], name)
    raise CheckpointError(f"no file of {str(folder)!r} holds {key!r}; derive or fetch the sub-model again")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
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
        packed = self._stored.packed(name)
        assert packed is not None  # noqa: S101 - only what is known has parts
        return packed.shapes[name]

    def encoding(self, name: str) -> Encoding | None:
        """Return how a tensor is stored as integers; None if it is not."""
        return self._stored.encoding_of(name)

    def float_type(self, name: str) -> str:
        """Return how safetensors calls the type of a tensor that is not stored as integers, `BF16` for one."""
        return str(self._file.get_slice(f"{name}.values" if name in self._parts else name).get_dtype())

    def floats(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor, unpacked; `dtype` is for weights that are stored as integers, others keep their own."""
        if name not in self._parts:
            tensor: Tensor = self._file.get_tensor(name).clone()
            return tensor
        return unpack_parts(name, self._read(name), self._stored, dtype)

    def mask(self, name: str) -> Tensor | None:
        """Return which entries of a weight are kept, bool [out_features, in_features]; None if it has no bitmask."""
        if "bitmask" not in self._parts.get(name, ()):
            return None
        stored = self._stored.pruned
        return unpack(PackedWeight(**self._read(name)), stored.shapes[name], name, stored.encoding)[1]

    def integers(self, name: str) -> Quantised:
        """Return a weight for which `encoding` is not None; what was removed has the code of 0."""
        parts, stored = self._read(name), self._stored
        if (whole := stored.whole(name)) is not None:
            weight, rows = _dense_weight(name, parts, stored)
            return unpack_dense_integers(weight, whole.shapes[name], name, whole.encoding, rows=rows)
        return unpack_integers(PackedWeight(**parts), stored.pruned.shapes[name], name, stored.pruned.encoding)[0]

    def _read(self, name: str) -> dict[str, Tensor]:
        return {suffix: self._file.get_tensor(f"{name}.{suffix}") for suffix in self._parts[name]}


def _wanted(path: Path, names: set[str], stored: Stored) -> dict[str, tuple[str, ...]]:
    """Return the suffixes of each weight of a shard that has parts; raises where they are not those of the config."""
    parts = {name for name in names if name.rpartition(".")[2] in PART_SUFFIXES}
    wanted = {name: part_suffixes(name, stored) for name in sorted({name.rpartition(".")[0] for name in parts})}
    expected = {f"{name}.{suffix}" for name, suffixes in wanted.items() for suffix in suffixes}
    stored.refuse_twice(names)
    for problem, wrong in (("lacks", expected - names), ("holds what config.json does not tell of,", parts - expected)):
        if wrong:
            raise CheckpointError(f"shard {str(path)!r} {problem} {min(wrong)!r}; derive or fetch the sub-model again")
    return wanted


def part_suffixes(name: str, stored: Stored) -> tuple[str, ...]:
    """Return the suffixes of the tensors of a weight that is not stored as it is; none for one that is not known."""
    if (whole := stored.whole(name)) is not None:
        trimmed = stored.shortlist is not None and stored.shortlist.weight == name
        return (*dense.stored_suffixes(whole.encoding), *([shortlist.SUFFIX] if trimmed else []))
    return bitmask.stored_suffixes(stored.pruned.encoding) if name in stored.pruned.shapes else ()


def unpack_parts(name: str, parts: Mapping[str, Tensor], stored: Stored, dtype: torch.dtype) -> Tensor:
    """Return a weight [out_features, in_features] from its parts by suffix, its rows in the order of the base model.

    Raises
    ------
    CheckpointError
        When a part is missing or too many, or the parts are damaged.
    """
    if parts.keys() != set(part_suffixes(name, stored)):
        raise damaged(name, f"it has the parts {', '.join(sorted(parts))}")
    if (whole := stored.whole(name)) is not None:
        weight, rows = _dense_weight(name, parts, stored)
        return unpack_dense(weight, whole.shapes[name], name, whole.encoding, dtype, rows=rows)
    return unpack(PackedWeight(**parts), stored.pruned.shapes[name], name, stored.pruned.encoding, dtype)[0]


def _dense_weight(name: str, parts: Mapping[str, Tensor], stored: Stored) -> tuple[DenseWeight, Tensor | None]:
    """Return a matrix without a bitmask, and where each of its rows is stored: None for its own place."""
    weight = DenseWeight(parts["values"], parts.get("scales"))
    if stored.shortlist is None or shortlist.SUFFIX not in parts:
        return weight, None
    count, vocabulary = stored.shortlist.tokens, stored.dense.shapes[name][0]
    tokens = checked_shortlist(parts[shortlist.SUFFIX].numpy(), count, vocabulary, name)
    return weight, torch.from_numpy(tokens.rows())
