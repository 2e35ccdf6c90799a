"""How long a derivation will take here, reckoned from products of matrices before any weight is read.

Nearly all of a derivation is products: passes of text through blocks, Gram matrices, and what methods multiply weights
with. Their numbers follow from shapes and recipe; how fast this machine is at them is tried out. Constants are those of
measured derivations (docs/results/cost.md); what comes out is right within a factor of about one and a half.
"""

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from secateur.config import Recipe
from secateur.models.device import limited_threads
from secateur.models.products import has_units, product_precision
from secateur.models.structure import Block
from secateur.pruning.allotment import measures
from secateur.pruning.base import Base
from secateur.pruning.divergence import POSITIONS, TOKENS, parts
from secateur.pruning.job import follows_parent
from secateur.pruning.likely_tokens import compared
from secateur.pruning.methods import METHODS
from secateur.pruning.recovery import SEEN
from secateur.pruning.weight import encoding_of

_TRIED = 1024  # rows and columns of the products that are tried out
_TRIED_SECONDS = 0.1
# Share of the tried speed at which each stage was seen to work.
_PASSES, _GRAMS, _SOLVING, _MEASURING, _LEARNING = 0.5, 1.0, 0.45, 0.6, 0.55
# Products of a weight with a matrix as wide as its inputs, and factors or inverses of that matrix.
_SOLVED = {"admm": (40, 5), "sparsegpt": (2, 1)}
_ROUNDED = (20, 1)  # codes that make up for each other, column by column
_BACKWARD = 3  # passes that a pass with its gradients takes


@dataclass(frozen=True)
class Work:
    """A derivation as numbers of multiplications with additions.

    Attributes
    ----------
    passes, grams
        Of text through blocks, and of the Gram matrices of inputs.
    solving
        Of methods and rounding.
    measuring
        Of budgets.
    learning
        Of recovery.
    """

    passes: float
    grams: float
    solving: float
    measuring: float
    learning: float

    def seconds(self, in_models: float, in_float32: float) -> float:
        """Return how long it takes with products so fast, per second, in the model's precision and in float32."""
        quick = self.passes / _PASSES + self.measuring / _MEASURING + self.learning / _LEARNING
        return quick / in_models + (self.grams / _GRAMS + self.solving / _SOLVING) / in_float32


def expected_seconds(base: Base, recipe: Recipe, *, tokens: int, recovering: int, threads: int) -> float:
    """Return how long a derivation takes on this processor, which is tried out for a fifth of a second.

    Parameters
    ----------
    tokens, recovering
        Of the calibration set, and of the text that recovery learns from.
    threads
        That it will have.
    """
    method, encoding = METHODS.get(recipe.method), encoding_of(recipe)
    work = work_of(
        base.model,
        base.blocks,
        method=recipe.method,
        tokens=0 if method.needs == "nothing" else tokens,
        streams=2 if follows_parent(recipe) else 1,
        gram=method.needs_gram,
        rounded=method.needs_gram and encoding.bits > 0,
        measuring=measures(recipe),
        recovering=recovering,
    )
    dtype = base.dtype()
    in_models = products_per_second(dtype if has_units(dtype) else torch.float32, threads)
    return work.seconds(in_models, products_per_second(torch.float32, threads))


def work_of(
    model: PreTrainedModel,
    blocks: tuple[Block, ...],
    *,
    method: str,
    tokens: int,
    streams: int,
    gram: bool,
    rounded: bool,
    measuring: bool,
    recovering: int,
) -> Work:
    """Count what a derivation multiplies.

    Parameters
    ----------
    tokens
        Of the calibration set, 0 where none is run through the model.
    streams
        2 where they run through the dense model too.
    gram
        Whether the method needs Gram matrices.
    rounded
        Whether values become integers that make up for each other.
    measuring
        Whether a budget is measured.
    recovering
        Tokens that are learnt from.
    """
    shapes = [model.get_parameter(block.weight_name(linear)).shape for block in blocks for linear in block.prunable]
    weights = float(sum(shape.numel() for shape in shapes))
    # The inputs of the last linear of each part are its own, those of the others are shared.
    inputs = [
        model.get_parameter(block.weight_name(linear)).shape[1]
        for block in blocks
        for linears in parts(block)
        for linear in dict.fromkeys((linears[0], linears[-1]))
    ]
    products, factors = _SOLVED.get(method, (0, 0))
    if rounded:
        products, factors = products + _ROUNDED[0], factors + _ROUNDED[1]
    config = model.config.get_text_config(decoder=True)
    head, likely = float(config.vocab_size * config.hidden_size), float(compared(model) * config.hidden_size)
    # Of the text that is learnt from, where it tells which tokens of the vocabulary are likely.
    seen = min(recovering, SEEN) if likely < head else 0
    # Each part is changed alone, and the model runs from its block on.
    runs = len(blocks) * 2
    measured = runs * (TOKENS * weights / 2 + POSITIONS * likely)
    return Work(
        passes=tokens * weights * (streams + 1),
        grams=tokens * float(sum(width**2 for width in inputs)) * streams * gram,
        solving=float(sum(shape.numel() * shape[1] * products + shape[1] ** 3 * factors for shape in shapes)),
        measuring=measured * measuring,
        learning=recovering * (weights + likely) * (1 + _BACKWARD) + seen * (weights + head),
    )


def products_per_second(dtype: torch.dtype, threads: int) -> float:
    """Return how many multiplications with additions this machine does in a second, tried out for a moment."""
    one, other = torch.ones(_TRIED, _TRIED, dtype=dtype), torch.ones(_TRIED, _TRIED, dtype=dtype)
    with limited_threads(threads), product_precision("medium", torch.device("cpu")):
        one @ other  # the first one sets things up
        count, begin = 0, time.perf_counter()
        while (seconds := time.perf_counter() - begin) < _TRIED_SECONDS:
            torch.mm(one, other)
            count += 1
    return count * float(_TRIED) ** 3 / seconds


def describe_seconds(seconds: float) -> str:
    """Return a duration as nobody would take for exact: `about 1 minute`, `about 25 minutes`, `about 3 hours`."""
    if seconds < 45:
        return "less than a minute"
    minutes = seconds / 60
    if minutes < 10:
        count, unit = round(minutes), "minute"
    elif minutes < 100:
        count, unit = 5 * round(minutes / 5), "minute"
    else:
        count, unit = round(minutes / 60), "hour"
    return f"about {count} {unit}{'s' * (count != 1)}"
