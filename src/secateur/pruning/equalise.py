"""Inputs made equally loud before their weights become integers.

A few inputs of a linear may be hundreds of times louder than the others (the first token's in down projections), and
then the rounding of their weights is most of the error of the layer. The column of a weight can be made larger by 2^e,
and rounded more finely by that, where what produces the input is made smaller by as much: the norm before it, or the
rows of another linear. Both are exact, since powers of two only move exponents. SmoothQuant (arXiv 2211.10438) and AWQ
(arXiv 2306.00978) fold scales in the same way, with exponents that follow from loudness alone; these here are those
with which the error that is to be expected is least.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.calibration.statistics import InputStatistics
from secateur.checkpoint.bitmask import PackedWeight
from secateur.checkpoint.dense import DenseWeight
from secateur.models.structure import Block
from secateur.models.weights import set_parameters
from secateur.pruning.masks import Target, keep_top

LOWEST, HIGHEST = -3, 6  # so that no scale leaves the range of float16, which GGUF files have
_ROWS = 1024
_GAIN, _TINY = 1e-4, 1e-30  # a move that gains less than that share is none


@dataclass(frozen=True)
class Source:
    """What produces an input: the parameters of one module, each of whose first axis has an entry for each feature.

    Attributes
    ----------
    module
        Its name within the block.
    is_linear
        Whether it is a linear, and its weight perhaps stored as integers.
    """

    module: str
    is_linear: bool

    def parameters(self, block: nn.Module) -> dict[str, Tensor]:
        """Return its parameters by their names within the block."""
        module = block.get_submodule(self.module)
        return {f"{self.module}.{name}": one.data for name, one in module.named_parameters(recurse=False)}


@dataclass(frozen=True)
class Inputs:
    """What some linears of a block receive.

    Attributes
    ----------
    linears
        Their names within the block.
    statistics
        Of the input, with `exponents`; None where the method needs none.
    source, exponents
        What produces the input, and int64 [in_features]: feature j is divided by 2^exponents[j]; None where it stays
        as it is.
    """

    linears: tuple[str, ...]
    statistics: InputStatistics | None
    source: Source | None = None
    exponents: Tensor | None = None

    def equalised(self, block: nn.Module, source: Source | None, group_size: int, sparsity: float) -> "Inputs":
        """Return the same input with the exponents that serve its weights best, which takes the statistics.

        `sparsity` is that of the weights when they are pruned.
        """
        weights = [block.get_parameter(f"{name}.weight").data for name in self.linears]
        # Quiet features of float16 would lose bits.
        if source is None or self.statistics is None or weights[0].dtype == torch.float16:
            return self
        exponents = column_exponents(weights, self.statistics.loudness(), group_size, sparsity)
        return Inputs(self.linears, self.statistics.quieter(exponents), source, exponents)

    def louder(self, weight: Tensor) -> Tensor:
        """Return the weight of one of the linears as it is for this input."""
        return weight if self.exponents is None else louder(weight, self.exponents)

    def quieten_source(
        self,
        block: Block,
        module: nn.Module,
        packed: dict[str, PackedWeight | DenseWeight],
        others: dict[str, Tensor],
    ) -> None:
        """Divide what produces the input: in the module, and where it is kept to be written, by qualified name."""
        if self.source is None or self.exponents is None:
            return
        parameters = self.source.parameters(module)
        set_parameters(module, quieter(parameters, self.exponents))
        for name in parameters:
            full = f"{block.name}.{name}"
            if full in others:
                others |= quieter({full: others[full]}, self.exponents)
            else:
                packed[full] = _quieter_rows(packed[full], self.exponents)


def _quieter_rows(packed: PackedWeight | DenseWeight, exponents: Tensor) -> PackedWeight | DenseWeight:
    """Return a packed weight with row j divided by 2^exponents[j]."""
    if packed.scales is not None:
        return replace(packed, scales=torch.ldexp(packed.scales, -exponents[:, None]))
    if isinstance(packed, DenseWeight):
        return replace(packed, values=torch.ldexp(packed.values, -exponents[:, None]))
    values = packed.values.clone()
    spread = torch.repeat_interleave(exponents, packed.row_offsets.diff())  # for each kept entry
    values[: len(spread)] = torch.ldexp(values[: len(spread)], -spread)
    return replace(packed, values=values)


def find_source(block: nn.Module, linears: Sequence[str], run: Callable[[], Tensor]) -> Source | None:
    """Return what produces the input that some linears of a block share; None where it cannot be told.

    Each module that could be it is tried: it is, if the outputs of the block stay the same to the bit when its features
    are scaled by powers of two and the columns of the linears by their inverses.

    Parameters
    ----------
    block
        With its weights; they are the same afterwards.
    linears
        All that receive the input, by their names within the block.
    run
        Runs the block on some text and returns its outputs.
    """
    own = {f"{name}.weight": block.get_parameter(f"{name}.weight").data for name in linears}
    features = own[f"{linears[0]}.weight"].shape[1]
    # As large as they can become: a source behind which values are clamped would pass with smaller ones.
    mixed = torch.randint(LOWEST, HIGHEST + 1, (features,), generator=torch.Generator().manual_seed(0))
    loudest = torch.full_like(mixed, LOWEST)
    before = run()

    def is_same(others: Mapping[str, Tensor], exponents: Tensor) -> bool:
        scaled = {name: louder(one, exponents) for name, one in own.items()}
        set_parameters(block, {**scaled, **quieter(others, exponents)})
        return torch.equal(run(), before)

    try:
        if is_same({}, mixed):  # the text does not reach these linears, and tells nothing of them
            return None
        for name in _candidates(block, linears, features):
            source = Source(name, type(block.get_submodule(name)) is nn.Linear)
            parameters = source.parameters(block)
            try:
                if is_same(parameters, mixed) and is_same(parameters, loudest):
                    return source
            finally:
                set_parameters(block, parameters)
    finally:
        set_parameters(block, own)
    return None


def _candidates(block: nn.Module, linears: Sequence[str], features: int) -> list[str]:
    """Return the norms of a block that are as wide, then the linears beside the given ones with as many outputs."""
    beside = linears[0].rpartition(".")[0]
    norms, others = [], []
    for name, module in block.named_modules():
        shapes = [tuple(one.shape) for one in module.parameters(recurse=False)]
        if type(module) is nn.Linear:
            if name not in linears and name.rpartition(".")[0] == beside and module.out_features == features:
                others.append(name)
        elif shapes and all(shape == (features,) for shape in shapes):
            norms.append(name)
    return norms + others


def quieter(parameters: Mapping[str, Tensor], exponents: Tensor) -> dict[str, Tensor]:
    """Return parameters with entry or row j of each divided by 2^exponents[j]."""
    found = {}
    for name, one in parameters.items():
        down = -exponents.to(one.device)
        found[name] = torch.ldexp(one, down if one.dim() == 1 else down[:, None])
    return found


def louder(weight: Tensor, exponents: Tensor) -> Tensor:
    """Return a weight [out_features, in_features] with column j multiplied by 2^exponents[j]."""
    return torch.ldexp(weight, exponents.to(weight.device))


def column_exponents(weights: Sequence[Tensor], loudness: Tensor, group_size: int, sparsity: float) -> Tensor:
    """Return the exponents with which the rounding of some weights of one input is expected to cost least.

    The step of a group of a row is as large as its largest entry, and the error of an entry as its step, whatever it
    is. So with s = 2^e the cost of a group is sum_i max_j (|w_ij| s_j)^2 * sum_j loudness_j / s_j^2, over the rows i of
    all weights, each as a share of its output (some hundred rows tell as much), and the entries j that will be kept:
    taken to be those that Wanda keeps, of which the loud ones are small. In each group the exponent is moved by one
    that gains most, while any gains.

    Parameters
    ----------
    weights
        Float [out_features, in_features] each.
    loudness
        float32 [in_features], at least 0: sums of squares of the inputs.
    group_size
        Input positions that share a scale.
    sparsity
        Of the weights, when they are pruned.

    Returns
    -------
    int64 [in_features], LOWEST to HIGHEST.
    """
    width = len(loudness)
    padding = (-width) % group_size
    if not bool(loudness.any()):
        return torch.zeros(width, dtype=torch.int64)
    loudness = loudness.cpu() / loudness.max()
    rows = torch.cat([_unit(one.to("cpu", torch.float32), loudness) for one in weights])
    rows = rows[:: -(-len(rows) // _ROWS)].abs()
    kept = keep_top(rows * loudness.sqrt(), Target(sparsity))
    entries = nn.functional.pad(rows * kept, (0, padding)).view(len(rows), -1, group_size)  # [rows, groups, positions]
    squares = nn.functional.pad(loudness * kept, (0, padding)).view(entries.shape)
    exponents = torch.zeros(entries.shape[1:], dtype=torch.int64)
    groups = torch.arange(len(exponents))
    while len(groups):
        position, move = _best_moves(entries[:, groups], squares[:, groups], exponents[groups])
        groups, position, move = groups[move != 0], position[move != 0], move[move != 0]
        exponents[groups, position] += move
        scale = torch.exp2(move.float())
        entries[:, groups, position] *= scale
        squares[:, groups, position] /= scale * scale
    return exponents.view(-1)[:width]


def _unit(weight: Tensor, loudness: Tensor) -> Tensor:
    """Return a weight scaled so that its outputs have a mean square of 1, were its inputs independent."""
    return weight / (weight.square() @ loudness).mean().sqrt().clamp_min(_TINY)


def _best_moves(entries: Tensor, squares: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each group a position and the move of its exponent, -1 or 1, that gains most; 0 where none gains.

    `entries` and `squares` [rows, groups, positions] are scaled by what was moved so far, and 0 where nothing is kept.
    """
    largest, where = entries.topk(min(2, entries.shape[2]), dim=2)
    first, second = largest[..., :1], largest[..., -1:]
    own = torch.zeros_like(entries, dtype=torch.bool).scatter_(2, where[..., :1], value=True)
    total = squares.sum(2, keepdim=True)
    now = (first.square() * total).sum(0)
    up = (torch.maximum(2 * entries, first).square() * (total - 0.75 * squares)).sum(0)
    down = (torch.where(own, torch.maximum(entries / 2, second), first).square() * (total + 3 * squares)).sum(0)
    up[exponents == HIGHEST], down[exponents == LOWEST] = torch.inf, torch.inf
    costs, best = torch.cat([up, down], dim=1).min(1)
    move = torch.where(best < up.shape[1], 1, -1)
    move[~(costs < now[:, 0] * (1 - _GAIN))] = 0
    return best % up.shape[1], move
