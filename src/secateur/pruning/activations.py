"""The inputs of the current block for the whole calibration set, as the loop over blocks carries them on."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.models.replay import BlockInputs


@dataclass(frozen=True)
class Activations:
    """Inputs of the current block, overwritten as the loop goes on.

    Attributes
    ----------
    hidden_states
        [samples, sequence_length, hidden_size] in the model's precision, in memory or mapped: behind the pruned blocks,
        or behind dense ones without propagation.
    parent
        The same behind the dense blocks; None where nobody asked for it.
    inputs
        The other arguments of each block.
    batch_size
        Sequences in one forward pass.
    """

    hidden_states: Tensor
    parent: Tensor | None
    inputs: BlockInputs
    batch_size: int

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield (batch number, view [batch, sequence_length, hidden_size], the same of the parent)."""
        parts = torch.split(self.hidden_states, self.batch_size)
        parents = parts if self.parent is None else torch.split(self.parent, self.batch_size)
        for number, (part, parent) in enumerate(zip(parts, parents, strict=True)):
            yield number, part, None if self.parent is None else parent
