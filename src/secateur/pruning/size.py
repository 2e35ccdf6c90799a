"""How large a sub-model will be, and the ways in which it can be as small as was asked for."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from secateur.checkpoint.bitmask import ALIGNMENT, bitmask_width
from secateur.checkpoint.dense import stored_width
from secateur.checkpoint.format import EIGHT_BIT_ENCODING, Encoding
from secateur.checkpoint.quantise import n_groups
from secateur.checkpoint.submodel import carried_files
from secateur.config import FOUR_BITS, EmbeddingValues, Granularity, GroupSize, Recipe, Values
from secateur.errors import ConfigError
from secateur.models.structure import embedding_weights
from secateur.pruning.base import Base
from secateur.pruning.weight import dense_encoding_of, encoding_of, is_unmasked

HIGHEST = 0.9  # sparsity that is ever chosen
# What is tried where a recipe leaves it open; int8 gains nothing by smaller groups, int4 loses more than nl4.
_VALUES: tuple[tuple[Values, GroupSize | None], ...] = (
    ("base", None),
    ("int8", 128),
    ("nl4", 32),
    ("nl4", 64),
    ("nl4", 128),
)
_EMBEDDINGS: tuple[EmbeddingValues, ...] = ("int8", "nl4")
_OFFSET_BYTES, _SCALE_BYTES, _TOKEN_BYTES = 8, 2, 4
# Of a tensor: its place in a header and in the index, its padding, and its lines in the manifest.
_TENSOR_BYTES, _OTHER_BYTES = 512, 65_536
_STEP = 1e-4
# Of the share of weights with eight bits: what is less is not worth the time to find out which, and from more it is not
# far to all of them.
_LEAST_EIGHT_BITS, MOST_EIGHT_BITS = 0.02, 0.95


@dataclass(frozen=True)
class Footprint:
    """The tensors of a base model, and from them the size of each sub-model of it.

    Attributes
    ----------
    pruned, whole, others
        (shape, bytes of an entry) of each prunable weight, of embedding and head, and of all other tensors.
    carried
        Bytes of the files that a sub-model carries unchanged.
    """

    pruned: tuple[tuple[torch.Size, int], ...]
    whole: tuple[tuple[torch.Size, int], ...]
    others: tuple[tuple[torch.Size, int], ...]
    carried: int

    @classmethod
    def of(cls, base: Base, names: Iterable[str] | None = None) -> "Footprint":
        """Read the headers of a base model; `names` are its tensors, as `Base.stored_names` finds out.

        Without them no weight is read, and a tied head is taken to be stored once, as it is in nearly all files.
        """
        pruned, whole = base.shapes(), embedding_weights(base.model)
        kinds: tuple[list[tuple[torch.Size, int]], ...] = ([], [], [])
        usual = base.dtype()
        with base.reader as reader:
            for name in [name for name, _ in base.model.named_parameters()] if names is None else names:
                kind = 0 if name in pruned else 1 if name in whole else 2
                dtype = reader.mapped(name).dtype if name in reader else usual  # what is missing is found out later
                kinds[kind].append((base.model.get_parameter(name).shape, dtype.itemsize))
        carried = sum(path.stat().st_size for path in carried_files(base.folder.path))
        return cls(tuple(kinds[0]), tuple(kinds[1]), tuple(kinds[2]), carried)

    def with_tokens(self, count: int, *, tokenizer: int, gone: int) -> "Footprint":
        """Return that of the same model with fewer tokens.

        `tokenizer` are the bytes of what shrinks with them, `gone` those of files that the smaller model does without.
        """
        rows = max(shape[0] for shape, _ in self.whole)
        whole = tuple((torch.Size((count, *shape[1:])), itemsize) for shape, itemsize in self.whole)
        return replace(self, whole=whole, carried=self.carried - gone - tokenizer * (rows - count) // rows)

    def folder(self, recipe: Recipe) -> int:
        """Return the bytes of a finished sub-model; a little more rather than less, since small files are guessed."""
        encoding = encoding_of(recipe)
        total = sum(
            weight_bytes(shape, encoding, itemsize, recipe.sparsity, recipe.granularity)
            for shape, itemsize in self.pruned
        )
        if recipe.eight_bits:
            total += round(recipe.eight_bits * self.eight_bits(recipe))
        total += self.outer(recipe) + sum(shape.numel() * itemsize for shape, itemsize in self.others)
        if recipe.trim_vocabulary:
            total += _TOKEN_BYTES * sum(shape[0] for shape, _ in self.whole)
        tensors = 4 * len(self.pruned) + 2 * len(self.whole) + len(self.others)
        return total + tensors * _TENSOR_BYTES + _OTHER_BYTES + self.carried

    def eight_bits(self, recipe: Recipe) -> int:
        """Return the bytes that eight bits for all prunable weights take more than four."""
        encoding = encoding_of(recipe)
        return sum(eight_bits_bytes(shape) - _whole_bytes(shape, encoding) for shape, _ in self.pruned)

    def outer(self, recipe: Recipe) -> int:
        """Return the bytes of embedding and head."""
        if recipe.values == "base":
            return sum(shape.numel() * itemsize for shape, itemsize in self.whole)
        return sum(_whole_bytes(shape, dense_encoding_of(recipe)) for shape, _ in self.whole)


def ways(footprint: Footprint, recipe: Recipe) -> tuple[Recipe, ...]:
    """Return recipes that are as small as `target_size` allows: for each kind of values, and of an embedding, one.

    What the recipe says stays; of what it leaves open each kind is there, with the lowest sparsity that is allowed.
    Where four bits leave bytes over although nothing is removed, some weights have eight.

    Raises
    ------
    ConfigError
        When nothing is as small.
    """
    target = recipe.target_size
    assert target is not None  # noqa: S101 - the only caller has looked
    found, smallest = [], ("", 0)
    for tried in _kinds(recipe):
        sparsity = _lowest_sparsity(footprint, tried, target, HIGHEST)
        if sparsity is not None:
            found.append(_with_eight_bits(footprint, tried.model_copy(update={"sparsity": sparsity}), target))
        least = footprint.folder(tried.model_copy(update={"sparsity": HIGHEST}))
        if not smallest[0] or least < smallest[1]:
            smallest = (_described(tried), least)
    if not found:
        raise ConfigError(
            f"a target size of {target / 1e6:,.0f} MB cannot be reached: with {smallest[0]} and {HIGHEST:.0%} removed "
            f"the sub-model has {smallest[1] / 1e6:,.0f} MB"
        )
    return tuple(found)


def _kinds(recipe: Recipe) -> list[Recipe]:
    """Return the recipe with each kind of values, groups and embedding that it leaves open."""
    given = recipe.model_fields_set
    kinds = ((recipe.values, recipe.group_size),) if "values" in given else _VALUES
    embeddings = (recipe.embedding_values,) if "embedding_values" in given else _EMBEDDINGS
    made = []
    for values, group_size in kinds:
        for embedding in embeddings if values != "base" else _EMBEDDINGS[:1]:
            update = {"values": values, "group_size": group_size, "embedding_values": embedding, "target_size": None}
            made.append(recipe.model_copy(update=update))
    return made


def _described(recipe: Recipe) -> str:
    beside = f", embedding {recipe.embedding_values}," if recipe.values != "base" else " values"
    return recipe.values + beside


def _lowest_sparsity(footprint: Footprint, recipe: Recipe, target: int, highest: float) -> float | None:
    """Return the lowest sparsity, in steps of 0.0001, with which the folder is small enough; None if there is none."""

    def fits(step: int) -> bool:
        return footprint.folder(recipe.model_copy(update={"sparsity": step * _STEP})) <= target

    if fits(0):  # without a bitmask, and so smaller than with the lowest sparsity
        return 0.0
    low, high = 0, round(highest / _STEP)
    if not fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return round(high * _STEP, 4)


def check_eight_bits(base: Base, recipe: Recipe) -> None:
    """Raise `ConfigError` when a share of eight bits is too small for any weight."""
    encoding = encoding_of(recipe)
    more = [eight_bits_bytes(shape) - _whole_bytes(shape, encoding) for shape in base.shapes().values()]
    if 0 < recipe.eight_bits * sum(more) < min(more):
        raise ConfigError(f"{recipe.eight_bits:.2%} in eight bits is less than any weight of this model: give more")


def _with_eight_bits(footprint: Footprint, recipe: Recipe, target: int) -> Recipe:
    """Return the recipe with as many weights in eight bits as the bytes that it leaves are enough for."""
    if recipe.sparsity or recipe.values not in FOUR_BITS or "eight_bits" in recipe.model_fields_set:
        return recipe
    left = target - footprint.folder(recipe)
    share = math.floor(left / footprint.eight_bits(recipe) / _STEP) * _STEP
    if share < _LEAST_EIGHT_BITS:
        return recipe
    return recipe.model_copy(update={"eight_bits": round(min(share, MOST_EIGHT_BITS), 4)})


def weight_bytes(
    shape: Sequence[int], encoding: Encoding, itemsize: int, sparsity: float, granularity: Granularity
) -> int:
    """Return the bytes of a prunable weight [out_features, in_features] as it is stored, or a few more.

    `itemsize` is that of an entry of the base model, in which it stays where the encoding has no bits of its own.
    """
    rows, columns = shape
    if is_unmasked(encoding, sparsity):
        return _whole_bytes(shape, encoding)
    bits = encoding.bits or 8 * itemsize
    if granularity == "per_output":
        kept = rows * ((bits * (columns - round(sparsity * columns)) + 7) // 8)
    else:  # rows keep more or fewer, and each ends with a whole byte
        kept = bits * (rows * columns - round(sparsity * rows * columns)) // 8 + rows * (bits % 8 > 0)
    padded = -(-kept // ALIGNMENT) * ALIGNMENT
    return rows * bitmask_width(columns) + padded + _OFFSET_BYTES * (rows + 1) + _scales_bytes(shape, encoding)


def eight_bits_bytes(shape: Sequence[int]) -> int:
    """Return the bytes of a prunable weight that has eight bits where others have four."""
    return _whole_bytes(shape, EIGHT_BIT_ENCODING)


def _whole_bytes(shape: Sequence[int], encoding: Encoding) -> int:
    return shape[0] * stored_width(shape[1], encoding) + _scales_bytes(shape, encoding)


def _scales_bytes(shape: Sequence[int], encoding: Encoding) -> int:
    return _SCALE_BYTES * shape[0] * n_groups(shape[1], encoding.group_size) if encoding.bits else 0
