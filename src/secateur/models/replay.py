"""Running one decoder block at a time with the arguments that the whole model gives it.

The decoder is run once over the calibration tokens with hollow blocks, which only write down what they receive. Each
real block is later called with its own recorded arguments (masks, rotary embeddings, whatever its architecture has);
nothing is rebuilt by hand.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import ModelError
from secateur.models.structure import Block


@dataclass(frozen=True)
class Call:
    """What a block receives beside the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _Hollow(nn.Module):
    """Stands in for a block: records its arguments and hands the hidden states on unchanged."""

    def __init__(self, block: nn.Module, record: Callable[[Tensor, Call], None]) -> None:
        super().__init__()
        self._record = record
        # Decoders read attributes such as `attention_type` off their blocks.
        for name, value in vars(block).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self._record(hidden_states, Call(arguments, keywords))
        return hidden_states


class BlockInputs:
    """The recorded calls of every block, by batch; equal calls are stored once."""

    def __init__(self, n_blocks: int) -> None:
        self._calls: list[list[Call]] = [[] for _ in range(n_blocks)]

    def add(self, block: int, call: Call) -> None:
        """Record the call of the next batch; a call equal to an earlier one shares its storage."""
        known = [*self._calls[block][-1:], *(calls[-1] for calls in self._calls[:block] if calls)]
        self._calls[block].append(next((one for one in known if _equal(one, call)), call))

    def get(self, block: int, batch: int) -> Call:
        """Return what `block` received in `batch`."""
        return self._calls[block][batch]


def record_inputs(  # noqa: PLR0917
    model: PreTrainedModel,
    blocks: tuple[Block, ...],
    token_ids: Tensor,
    batch_size: int,
    store: Callable[[int, Tensor], object],
    device: torch.device,
) -> BlockInputs:
    """Run the decoder with hollow blocks over a calibration set.

    Parameters
    ----------
    model
        The skeleton; everything outside the blocks that runs before them must have its weights.
    token_ids
        int64 [samples, sequence_length].
    batch_size
        Sequences in one pass.
    store
        Called with the index of the first sequence of a batch and the input [batch, sequence_length, hidden_size] of
        the first block.

    Returns
    -------
    BlockInputs
        The arguments of each block and batch.

    Raises
    ------
    ModelError
        When blocks are not called one after another on the output of the one before, or give more than hidden states.
    """
    inputs = BlockInputs(len(blocks))
    order: list[int] = []
    start = 0

    def recorder(index: int) -> Callable[[Tensor, Call], None]:
        def record(hidden_states: Tensor, call: Call) -> None:
            if hidden_states.dim() != 3:
                # Such a decoder takes the first of a tuple, which of a tensor is its first sequence.
                raise ModelError(f"{type(model).__name__} expects more than hidden states from a block; not supported")
            order.append(index)
            inputs.add(index, call)
            if index == 0:
                store(start, hidden_states)

        return record

    with _hollowed(model, blocks, recorder):
        for start in range(0, token_ids.shape[0], batch_size):
            order.clear()
            model.get_decoder()(input_ids=token_ids[start : start + batch_size].to(device), use_cache=False)
            if order != list(range(len(blocks))):
                raise ModelError(
                    f"{type(model).__name__} does not run its blocks one after another (order {order}); not supported"
                )
    return inputs


def _tell_nobody(_: int) -> Callable[[Tensor, Call], None]:
    return lambda *_: None


@contextmanager
def _hollowed(
    model: PreTrainedModel, blocks: Sequence[Block], recorder: Callable[[int], Callable[[Tensor, Call], None]]
) -> Iterator[None]:
    """While it is open blocks only tell what they receive, each to the recorder of its index; then they are back."""
    originals = {block.name: model.get_submodule(block.name) for block in blocks}
    try:
        for block in blocks:
            model.set_submodule(block.name, _Hollow(originals[block.name], recorder(block.index)))
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


@contextmanager
def starting_at(model: PreTrainedModel, blocks: tuple[Block, ...], index: int, hidden_states: Tensor) -> Iterator[None]:
    """While it is open the model's forward pass begins with block `index`, on [batch, sequence_length, hidden_size]."""
    first = model.get_submodule(blocks[index].name)
    handle = first.register_forward_pre_hook(lambda _, arguments: (hidden_states, *arguments[1:]))
    try:
        with _hollowed(model, blocks[:index], _tell_nobody):
            yield
    finally:
        handle.remove()


def run_block(block: nn.Module, hidden_states: Tensor, call: Call) -> Tensor:
    """Run one block and return its hidden states [batch, sequence_length, hidden_size]."""
    output = block(hidden_states, *call.arguments, **call.keywords)
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Call) and isinstance(right, Call):
        return _equal(left.arguments, right.arguments) and _equal(left.keywords, right.keywords)
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right))
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return left is right or (type(left) is type(right) and isinstance(left, int | float | str) and left == right)
