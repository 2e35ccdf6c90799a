"""What a model loses by each way of making it smaller, measured on a little text before anything is derived.

Two things are measured on the whole model, by the divergence of its next-token probabilities: what it loses when all
prunable weights are pruned to 50% with Wanda, and what it loses when embedding and head have four bits instead of
eight, which one model hardly feels and another cannot bear. What better methods, other sparsities and rounding cost is
reckoned from the first (docs/results/bits.md). That is rough, but ways that are as small differ by far more.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from secateur.checkpoint.format import DENSE_ENCODINGS, INTEGER_BITS
from secateur.config import FOUR_BITS, Recipe
from secateur.errors import ModelError
from secateur.models.products import fast_products
from secateur.models.structure import embedding_weights
from secateur.pruning.base import Base
from secateur.pruning.budgets import EIGHT_BITS_FIRST, share_that_is_pruned
from secateur.pruning.divergence import (
    first_tokens,
    mean_divergence,
    spread_logits,
    spread_positions,
    summing_squares,
    wanda_pruned,
)
from secateur.pruning.masks import Target
from secateur.pruning.method import Method
from secateur.pruning.methods import METHODS
from secateur.pruning.weight import rounded
from secateur.resources import release_freed_memory

_HALF = 0.5
# Over the square root of what half of the weights cost with Wanda (where that is twice as much, these are hardly more):
# what half of them cost with a method that has a Gram matrix, and what rounding costs on top of any sparsity, with such
# a method and without. Below what was measured all is taken to be in proportion.
_GRAM = 0.18
_ROUNDING = {"base": (0.0, 0.0), "int8": (0.002, 0.002), "int4": (0.06, 0.13), "nl4": (0.05, 0.1)}
_LEAST_MEASURED = 0.2
# By how much the logarithm of what is lost grows from sparsity 0 to 1, with a Gram matrix and without.
_GROWTH, _WANDAS_GROWTH = 7.0, 8.5
# The same of four bits by their groups: what a scale for more or fewer inputs costs, beside that for 64.
_GROUPS = {32: 0.75, 64: 1.0, 128: 1.3}
_BY_LOSS = ("base", "int8", "nl4", "int4")


@dataclass(frozen=True)
class Prices:
    """Nats per token that a model loses.

    Attributes
    ----------
    halving
        When all prunable weights are pruned to 50% with Wanda.
    small_embedding
        When embedding and head have four bits; int8 is taken to lose nothing.
    nats
        What the model itself pays for a token: so much is lost by each token that a text is longer.
    """

    halving: float
    small_embedding: float
    nats: float = 0.0

    def of(self, recipe: Recipe) -> float:
        """Return what a recipe is expected to lose."""
        method = METHODS.get(recipe.method)
        pruned, sparsity = 1.0, recipe.sparsity
        if recipe.budget == "packed" and recipe.values != "base":
            pruned, sparsity = share_that_is_pruned(sparsity, INTEGER_BITS[recipe.values])
        root = math.sqrt(max(self.halving, _LEAST_MEASURED)) * min(1.0, self.halving / _LEAST_MEASURED)
        half, growth = (_GRAM * root, _GROWTH) if method.needs_gram else (self.halving, _WANDAS_GROWTH)
        pruning = pruned * half * math.exp(growth * (sparsity - _HALF)) if recipe.sparsity else 0.0
        embedding = self.small_embedding if _has_small_embedding(recipe) else 0.0
        return pruning + root * self._rounding(recipe, method) + embedding

    @staticmethod
    def _rounding(recipe: Recipe, method: Method) -> float:
        column = 0 if method.needs_gram else 1
        cost, eight = _ROUNDING[recipe.values][column], _ROUNDING["int8"][column]
        if not _in_four_bits(recipe):
            return cost
        still: float = (1 - recipe.eight_bits) ** EIGHT_BITS_FIRST
        return eight + (cost * _GROUPS.get(recipe.group_size or 0, 1.0) - eight) * still


def cheapest(recipes: Sequence[Recipe], measure: Callable[[], Prices]) -> Recipe:
    """Return the recipe of which least is lost; nothing is measured where that is plain."""
    left = [one for one in recipes if not any(other is not one and _loses_less(other, one) for other in recipes)]
    return left[0] if len(left) == 1 else min(left, key=measure().of)


def _loses_less(one: Recipe, other: Recipe) -> bool:
    """Return whether `one` removes no more than `other` and rounds nothing more, and is not the same."""

    def lost(recipe: Recipe) -> tuple[float, ...]:
        groups, share = (recipe.group_size or 0, 1 - recipe.eight_bits) if _in_four_bits(recipe) else (0, 0.0)
        return recipe.sparsity, _BY_LOSS.index(recipe.values), _has_small_embedding(recipe), groups, share

    mine, theirs = lost(one), lost(other)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def _in_four_bits(recipe: Recipe) -> bool:
    return recipe.values in FOUR_BITS


def measure_prices(
    base: Base,
    token_ids: Tensor,
    recipe: Recipe,
    device: torch.device,
    progress: Callable[[int, int], None],
    *,
    embedding: str = "nl4",
) -> Prices:
    """Measure what a base model loses on text that is not what it will be judged by.

    Parameters
    ----------
    token_ids
        int64 [samples, sequence_length]: calibration text, of which the first tokens are taken.
    recipe
        How many tokens the first one counts as, and what scores compete in.
    progress
        Called with the steps that are done, and their number.
    embedding
        The values of a small embedding.

    Raises
    ------
    ModelError
        When the probabilities are no numbers.
    """
    model = base.loaded(base.tensors(device))
    token_ids = first_tokens(token_ids).to(device)
    with torch.inference_mode(), fast_products():
        progress(0, 3)
        with ExitStack() as watching:
            sums = {
                block.name: watching.enter_context(
                    summing_squares(model.get_submodule(block.name), block.prunable, recipe.first_token_weight)
                )
                for block in base.blocks
            }
            parent = spread_logits(model, token_ids)
        if not bool(torch.isfinite(parent).all()):
            raise ModelError("the model itself gives probabilities that are no numbers: it overflows in its precision")
        nats = _nats(parent, token_ids)
        progress(1, 3)
        with _small_embedding(model, embedding):
            release_freed_memory()
            small = _finite(mean_divergence(parent, spread_logits(model, token_ids)))
        progress(2, 3)
        for block in base.blocks:  # in place: there is no memory for two of all weights, and nobody needs them again
            module = model.get_submodule(block.name)
            for linear in block.prunable:
                weight = module.get_parameter(f"{linear}.weight")
                weight.data = wanda_pruned(weight.data, sums[block.name][linear], Target(_HALF, recipe.granularity))
            release_freed_memory()
        halving = _finite(mean_divergence(parent, spread_logits(model, token_ids)))
        progress(3, 3)
    del model, module, weight
    release_freed_memory()
    return Prices(halving, small, nats)


def _nats(logits: Tensor, token_ids: Tensor) -> float:
    """Return the mean negative log-likelihood of the tokens that follow the positions of `spread_logits`."""
    positions = spread_positions(token_ids) + 1
    positions = positions[positions < token_ids.shape[1]]  # the last one has no token behind it
    rows = logits.view(len(token_ids), -1, logits.shape[-1])[:, : len(positions)]
    if not len(positions):
        return 0.0
    return float(functional.cross_entropy(rows.flatten(0, 1).float(), token_ids[:, positions].flatten()))


@contextmanager
def _small_embedding(model: PreTrainedModel, values: str) -> Iterator[None]:
    """While it is open embedding and head have these values."""
    weights = [model.get_parameter(name) for name in embedding_weights(model)]
    originals = [weight.data for weight in weights]
    round_embedding(model, values)
    try:
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original


def _has_small_embedding(recipe: Recipe) -> bool:
    return recipe.values != "base" and recipe.embedding_values != "int8"


def round_embedding(model: PreTrainedModel, values: str = "nl4") -> PreTrainedModel:
    """Give embedding and head of a model the values that they have when they are stored so; return the model."""
    for weight in {id(one): one for one in map(model.get_parameter, embedding_weights(model))}.values():
        weight.data = rounded(weight.data, DENSE_ENCODINGS[values])
    return model


def _finite(lost: float) -> float:
    if not lost < math.inf:
        raise ModelError(
            "the model gives probabilities that are no numbers when it is made smaller: give --values and "
            "--embedding-values beside --target-size"
        )
    return max(0.0, lost)
