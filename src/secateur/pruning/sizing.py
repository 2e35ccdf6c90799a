"""From a size that is asked for to a recipe: the ways to be as small, and the one that is expected to lose least."""

import os
from collections.abc import Sequence

import torch

from secateur.config import Recipe
from secateur.errors import ModelError
from secateur.models.device import limited_threads
from secateur.models.vocabulary import check_vocabulary
from secateur.pruning.base import Base
from secateur.pruning.execution import Execution
from secateur.pruning.job import forecast_job
from secateur.pruning.prices import Prices, cheapest, measure_prices
from secateur.pruning.size import Footprint, ways
from secateur.pruning.texts import Texts
from secateur.pruning.workspace import begun_recipe, check_begun, check_output, first_difference, partial_folder

_KIND = ("values", "group_size", "embedding_values")
# Share of the bytes from which on fewer tokens are worth a word, and how many there have to be.
_MUCH, _MANY_TOKENS = 0.2, 30_000


def sized_recipes(base: Base, recipe: Recipe) -> tuple[Recipe, ...]:
    """Return the recipe alone, or those that its target size leaves; raises `ConfigError` when nothing is as small."""
    return (recipe,) if recipe.target_size is None else ways(Footprint.of(base, base.stored_names()), recipe)


def best_way(
    base: Base, asked: Recipe, sized: tuple[Recipe, ...], texts: Texts, execution: Execution, *, advise: bool = True
) -> Recipe:
    """Return the one of several recipes, all as small as was asked for, that is expected to lose least.

    With `advise` it is said where fewer tokens may serve better.

    A derivation that is resumed has the recipe that it was begun with, which was measured then.

    Raises
    ------
    OutputError, ConfigError
        When the output exists, or what is resumed was begun with another recipe: before anything is measured.
    ResourceError
        When the whole model does not fit into memory.
    """
    if asked.target_size is None:
        return sized[0]
    begun = {"recipe": begun_recipe(execution.target) if execution.resume else None}
    # What an earlier version has begun, or a recipe without, has no weights in eight bits; it is as small.
    known = (*sized, *(one.model_copy(update={"eight_bits": 0.0}) for one in sized if one.eight_bits))
    found = next((one for one in known if not first_difference(begun, {"recipe": one.to_dict()}, begun)), None)
    if found is None:
        if begun["recipe"] is not None:
            kind = tuple(map(begun["recipe"].get, _KIND))
            likest = next((one for one in sized if tuple(map(one.to_dict().get, _KIND)) == kind), sized[0])
            check_begun(execution.target, begun["recipe"], likest.to_dict())
        if not (execution.resume and os.path.lexists(execution.target)):
            check_output(execution.target, resume=execution.resume)
        found = cheapest(sized, lambda: measured(base, sized, texts, execution))
    execution.say(f"for {asked.target_size / 1e6:,.0f} MB: {_described(found)}{_advice(base, asked, found) * advise}")
    return found


def _advice(base: Base, asked: Recipe, found: Recipe) -> str:
    """Return what to try where much of what was asked for goes to tokens, of which one language needs few."""
    assert asked.target_size is not None  # noqa: S101 - the only caller has looked
    outer = Footprint.of(base).outer(found)
    rows = base.model.config.get_text_config(decoder=True).vocab_size
    if asked.vocabulary is not None or outer < _MUCH * asked.target_size or rows < _MANY_TOKENS:
        return ""
    try:
        check_vocabulary(base.folder, 1)
    except ModelError:
        return ""
    return f"; {outer / asked.target_size:.0%} of that are {rows:,} tokens: --vocabulary auto may lose less"


def measured(base: Base, sized: Sequence[Recipe], texts: Texts, execution: Execution, *, stage: str = "size") -> Prices:
    """Measure what the ways of some recipes cost on calibration text; raises `ResourceError` without the memory."""
    texts.check(base.model)
    token_ids, threads = texts.calibration.token_ids, execution.n_threads
    folder, device = partial_folder(execution.target), execution.torch_device
    forecast_job(base, sized[-1], token_ids.size, None, threads, folder, device=device, sizing=True)

    def progress(done: int, total: int) -> None:
        execution.progress(stage, done, total)

    embedding = next((one.embedding_values for one in sized if one.embedding_values != "int8"), "nl4")
    with limited_threads(threads):
        return measure_prices(base, torch.from_numpy(token_ids), sized[0], device, progress, embedding=embedding)


def _described(recipe: Recipe) -> str:
    if recipe.values == "base":
        return f"values base, sparsity {recipe.sparsity}"
    groups = f" in groups of {recipe.group_size}"
    size = "as many bytes as with sparsity" if recipe.budget == "packed" and recipe.sparsity else "sparsity"
    wide = f", {recipe.eight_bits:.1%} in eight bits" if recipe.eight_bits else ""
    return f"values {recipe.values}{groups}{wide}, embedding {recipe.embedding_values}, {size} {recipe.sparsity}"
