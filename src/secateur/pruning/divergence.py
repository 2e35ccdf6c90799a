"""What a model loses when one part of it is pruned or rounded: what budgets go by that are measured.

The parts are what a block consists of, such as its attention and its MLP. Each is changed alone, in a way that is quick
and orders the parts as better ones do, such as Wanda (docs/results/methods.md); then the whole model runs over a little
of the calibration text, and its next-token probabilities are held against those of the parent.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.calibration.statistics import InputStatistics
from secateur.errors import ModelError
from secateur.models.replay import record_inputs, run_block, starting_at
from secateur.models.structure import Block
from secateur.pruning.budgets import Divergence
from secateur.pruning.likely_tokens import likeliest, total_probabilities, with_tokens
from secateur.pruning.masks import Target, zero_removed
from secateur.pruning.methods import METHODS

Change = Callable[[Tensor, InputStatistics], Tensor]  # from a weight and what its inputs are like to another

TOKENS = 2048  # that run through the model for each part
POSITIONS = 512  # of them, at which probabilities are compared
_ROWS = 64  # positions whose probabilities are in float32 at a time


def measure_divergence(  # noqa: PLR0917
    model: PreTrainedModel,
    blocks: tuple[Block, ...],
    token_ids: Tensor,
    change: Change,
    first_token_weight: float,
    progress: Callable[[int, int], None],
) -> Divergence:
    """Change each part of a model alone and return the divergence of the model from what it was.

    Parameters
    ----------
    model
        With all its weights, which it has again at the end.
    blocks
        Its decoder blocks.
    token_ids
        int64 [samples, sequence_length]: calibration text, of which the first `TOKENS` are taken.
    change
        Returns what takes the place of a weight, by what its inputs are like.
    first_token_weight
        As how many tokens the first one of each sequence counts in the norms of inputs.
    progress
        Called with the blocks that are done, and their number.

    Returns
    -------
    Divergence
        Mean of KL(parent || changed) over `POSITIONS` positions, in nats, by the names of the weights of each part; of
        the probabilities among the likeliest tokens (`likely_tokens`), which are nearly all.

    Raises
    ------
    ModelError
        When the probabilities are no numbers.
    """
    token_ids = first_tokens(token_ids).to(model.device)
    received: list[Tensor] = []
    with torch.inference_mode():
        calls = record_inputs(
            model, blocks, token_ids, len(token_ids), lambda _, hidden: received.append(hidden), model.device
        )
        hidden, parent, found = received[0], spread_logits(model, token_ids), dict[tuple[str, ...], float]()
        likely = likeliest(model, total_probabilities(parent))
        parent = parent[:, likely]
        for block in blocks:
            progress(block.index, len(blocks))
            module = model.get_submodule(block.name)
            with summing_squares(module, block.prunable, first_token_weight) as sums:
                following = run_block(module, hidden, calls.get(block.index, 0))
            with starting_at(model, blocks, block.index, hidden), with_tokens(model, likely):
                for linears in parts(block):
                    with _changed(module, {linear: sums[linear] for linear in linears}, change):
                        lost = mean_divergence(parent, spread_logits(model, token_ids))
                    if not lost < float("inf"):
                        raise ModelError(f"{block.name} gives probabilities that are no numbers when it is changed")
                    found[tuple(map(block.weight_name, linears))] = max(0.0, lost)
            hidden = following
        progress(len(blocks), len(blocks))
    return found


def first_tokens(token_ids: Tensor) -> Tensor:
    """Return the sequences of [samples, sequence_length] in which the first `TOKENS` are, one that is longer cut."""
    return token_ids[: max(1, TOKENS // token_ids.shape[1]), :TOKENS]


def parts(block: Block) -> list[tuple[str, ...]]:
    """Return the linears of a block by the module of the block that they belong to, such as its attention."""
    grouped: dict[str, list[str]] = {}
    for linear in block.prunable:
        grouped.setdefault(linear.partition(".")[0] if "." in linear else "", []).append(linear)
    return [tuple(linears) for linears in grouped.values()]


def spread_positions(token_ids: Tensor) -> Tensor:
    """Return positions in [samples, sequence_length] that lie evenly, the same in each sequence."""
    step = max(1, token_ids.numel() // POSITIONS)
    return torch.arange(step - 1, token_ids.shape[1], step, device=token_ids.device)


def spread_logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Return [positions, vocabulary], of positions that lie evenly."""
    positions = spread_positions(token_ids)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits: Tensor = model(input_ids=token_ids, use_cache=False, logits_to_keep=positions).logits
    else:
        logits = model(input_ids=token_ids, use_cache=False).logits[:, positions]
    return logits.flatten(0, 1)


def mean_divergence(parent: Tensor, ours: Tensor) -> float:
    """Return the mean of KL(parent || ours) over rows of logits [positions, vocabulary], in nats."""
    total = 0.0
    for theirs, rows in zip(torch.split(parent, _ROWS), torch.split(ours, _ROWS), strict=True):
        wanted, found = theirs.float().log_softmax(-1), rows.float().log_softmax(-1)
        total += (wanted.exp() * (wanted - found)).sum().item()
    return total / len(parent)


@contextmanager
def summing_squares(
    block: nn.Module, linears: tuple[str, ...], first_weight: float
) -> Iterator[dict[str, InputStatistics]]:
    """While it is open a pass through the block fills in the sums of squares of what each linear receives.

    Unlike in the norms that Wanda has elsewhere, first tokens count more: that better methods keep them, and Wanda does
    not, says nothing about what a part is worth.
    """
    sums: dict[str, InputStatistics] = {}
    # Made before anything large: what is small and stays would keep the memory between it from being used again.
    widths = {linear: block.get_parameter(f"{linear}.weight").shape[1] for linear in linears}
    totals = {linear: torch.zeros(width) for linear, width in widths.items()}

    def watch(linear: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            squares = arguments[0].float().square()
            total = totals[linear].copy_(squares.flatten(0, -2).sum(0))
            if squares.dim() > 2:
                total += ((first_weight - 1) * squares[:, 0].sum(0)).to(total.device)
            sums[linear] = InputStatistics(total, squares.shape[:-1].numel())

        return add

    handles = [block.get_submodule(linear).register_forward_pre_hook(watch(linear)) for linear in linears]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _changed(block: nn.Module, statistics: Mapping[str, InputStatistics], change: Change) -> Iterator[None]:
    """While it is open others are in the place of some weights of the block."""
    weights = {linear: block.get_parameter(f"{linear}.weight") for linear in statistics}
    originals = {linear: weight.data for linear, weight in weights.items()}
    for linear, weight in weights.items():
        weight.data = change(weight.data, statistics[linear])
    try:
        yield
    finally:
        for linear, weight in weights.items():
            weight.data = originals[linear]


def wanda_pruned(weight: Tensor, statistics: InputStatistics, target: Target) -> Tensor:
    """Return a weight as Wanda prunes it, with zeros."""
    pruned = METHODS.get("wanda").function(weight, statistics, target)
    return zero_removed(pruned.weight, pruned.mask)
