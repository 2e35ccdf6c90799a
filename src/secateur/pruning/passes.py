"""How the calibration set runs through one block while its weights are pruned: at once, or stage by stage.

At once: one pass tells what all weights receive in the dense block, as in Wanda, and a second one, behind the pruned
weights, gives the inputs of the next block. Stage by stage: the weights with one input are pruned before the next input
is looked at, so that these see what the pruned ones put out, and the same pass through the parent's block tells what
the input was there. A pass stands still at each stage and is not run again, where memory allows to keep all of them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from secateur.calibration.statistics import InputStatistics, InputSum, ParentInputs, StatisticsCollector
from secateur.config import Recipe
from secateur.models.replay import run_block
from secateur.models.stepping import Groups, SteppedPass, Stepper, groups_by_input
from secateur.models.weights import set_parameters
from secateur.pruning.activations import Activations
from secateur.pruning.methods import METHODS


def in_stages(recipe: Recipe) -> bool:
    """Return whether blocks are pruned stage by stage, each behind the pruned weights of the one before."""
    return recipe.propagate and METHODS.get(recipe.method).needs_gram


@dataclass(frozen=True)
class Course:
    """One block and what runs through it.

    Attributes
    ----------
    module
        The block, with its weights.
    linears
        Those that are pruned, by their names within the block.
    activations, index
        What it receives, as block number `index`.
    device
        Where it is.
    gram, first_weight
        What is summed of inputs, see `InputSum`.
    is_last
        Whether nobody needs its outputs.
    """

    module: nn.Module
    linears: tuple[str, ...]
    activations: Activations
    index: int
    device: torch.device
    gram: bool
    first_weight: float
    is_last: bool

    def forward(self, hidden: Tensor, batch: int) -> Tensor:
        """Return the outputs of the block for a batch of its inputs [batch, sequence_length, hidden_size]."""
        return run_block(self.module, hidden.to(self.device), self.activations.inputs.get(self.index, batch))

    def probe(self) -> Tensor:
        """Return the outputs for the first batch."""
        with torch.inference_mode():
            return self.forward(next(iter(self.activations.batches()))[1], 0)

    def propagate(self) -> None:
        """Replace the activations by the outputs of the block as it is now, unless nobody needs them."""
        if self.is_last:
            return
        with torch.inference_mode():
            for batch, hidden, _ in self.activations.batches():
                hidden.copy_(self.forward(hidden, batch))

    def propagate_parent(self) -> None:
        """Replace the parent's activations, if there are any, by the outputs of the block as it is now."""
        if self.is_last:
            return
        with torch.inference_mode():
            for batch, _, parent in self.activations.batches():
                if parent is not None:
                    parent.copy_(self.forward(parent, batch))


class Passes(Protocol):
    """All passes through one block; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def stages(self) -> Groups:
        """Return the linears that are pruned together, stage by stage."""
        ...

    def collect(self, stage: int) -> Mapping[str, InputStatistics]:
        """Return statistics of the inputs of a stage's linears, by their names; the stages before are pruned."""
        ...

    def quieten(self, exponents: Tensor) -> None:
        """Divide feature j of the inputs that were collected last by 2^exponents[j], as what produces them has been."""
        ...

    def finish(self) -> None:
        """Replace the activations by the inputs of the next block."""
        ...


class NoPasses:
    """Of a method that needs no statistics."""

    def __init__(self, linears: tuple[str, ...]) -> None:
        self._linears = linears

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stages(self) -> Groups:
        """Return one stage of all linears."""
        return (self._linears,)

    def collect(self, stage: int) -> Mapping[str, InputStatistics]:
        """Return nothing."""
        return {}

    def quieten(self, exponents: Tensor) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class WholePasses(NoPasses):
    """One pass for the statistics of all linears, and one behind the pruned weights, unless they are not propagated."""

    def __init__(self, course: Course, *, propagate: bool) -> None:
        super().__init__(course.linears)
        self._course, self._propagate = course, propagate

    def collect(self, stage: int) -> Mapping[str, InputStatistics]:
        """Return the statistics of all."""
        course = self._course
        collector = StatisticsCollector(
            course.module,
            course.linears,
            stop_early=self._propagate,
            gram=course.gram,
            first_weight=course.first_weight,
        )
        with collector, torch.inference_mode():
            for batch, hidden, _ in course.activations.batches():
                output = collector.run(lambda: course.forward(hidden, batch))  # noqa: B023 - called at once
                if not self._propagate:
                    hidden.copy_(output)
        return collector.results()

    def finish(self) -> None:
        """Run the pruned block."""
        if self._propagate:
            self._course.propagate()


class StagedPasses:
    """One pass for each batch, and one of the parent, that stand still at each stage.

    Parameters
    ----------
    course
        The block, still dense.
    dense
        The parent's parameters, by their names within the block.
    keep
        Whether passes wait for the next stage. If not, they are run again from the start, which gives the same.

    Raises
    ------
    ModelError
        When a linear receives no input.
    """

    def __init__(self, course: Course, dense: dict[str, Tensor], *, keep: bool) -> None:
        self._course, self._dense, self._keep = course, dense, keep
        self._groups = groups_by_input(course.module, course.linears, course.probe)
        self._stepper = Stepper(course.module, self._groups)
        self._pupils: dict[int, SteppedPass] = {}
        self._parents: dict[int, SteppedPass] = {}
        self._factor: Tensor | None = None

    def __enter__(self) -> Self:
        self._stepper.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        for passes in (self._pupils, self._parents):
            while passes:
                passes.popitem()[1].abandon()
        self._stepper.__exit__(*exception)

    def stages(self) -> Groups:
        """Return the linears by the input that they share."""
        return self._groups

    def collect(self, stage: int) -> Mapping[str, InputStatistics]:
        """Return the statistics of one input."""
        course, linears = self._course, self._groups[stage]
        weights = [self._dense[f"{linear}.weight"] for linear in linears]
        total = InputSum(weights[0].shape[1], course.device, gram=course.gram, first_weight=course.first_weight)
        for batch, hidden, parent in course.activations.batches():
            theirs = None if parent is None else ParentInputs.of(self._parent_at(stage, batch, parent), weights)
            with torch.inference_mode():
                ours = self._advance(self._pupils, hidden, batch, lambda one: one.advance(stage, self._factor))
                total.add(ours, theirs)
            del ours, theirs
            if parent is not None and stage == len(self._groups) - 1:
                self._finish_parent(batch, parent)
            if not self._keep:
                self._forget(batch)
        self._factor = None
        return dict.fromkeys(linears, total.result(linears[0]))

    def quieten(self, exponents: Tensor) -> None:
        """Note it for passes that wait with an input that was produced before; others run behind what produces it."""
        if self._keep:
            self._factor = torch.exp2(-exponents.float())

    def finish(self) -> None:
        """Let all passes go on to their ends."""
        if self._course.is_last:
            return
        with torch.inference_mode():
            for batch, hidden, _ in self._course.activations.batches():
                hidden.copy_(self._advance(self._pupils, hidden, batch, lambda one: one.finish(self._factor)))
                del self._pupils[batch]

    def _parent_at(self, stage: int, batch: int, parent: Tensor) -> Tensor:
        with self._dense_weights(), torch.inference_mode():
            return self._advance(self._parents, parent, batch, lambda one: one.advance(stage))

    def _finish_parent(self, batch: int, parent: Tensor) -> None:
        ending = self._parents.pop(batch)
        if self._course.is_last:
            ending.abandon()
            return
        with self._dense_weights(), torch.inference_mode():
            parent.copy_(ending.finish())

    def _advance(
        self, passes: dict[int, SteppedPass], hidden: Tensor, batch: int, go: Callable[[SteppedPass], Tensor]
    ) -> Tensor:
        if batch not in passes:
            passes[batch] = self._stepper.begin(lambda: self._course.forward(hidden, batch))
        return go(passes[batch])

    def _forget(self, batch: int) -> None:
        for passes in (self._pupils, self._parents):
            if batch in passes:
                passes.pop(batch).abandon()

    @contextmanager
    def _dense_weights(self) -> Iterator[None]:
        """While it is open the block has the parent's parameters."""
        own = {name: parameter.data for name, parameter in self._course.module.named_parameters()}
        set_parameters(self._course.module, self._dense)
        try:
            yield
        finally:
            set_parameters(self._course.module, own)
