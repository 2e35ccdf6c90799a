"""How the calibration set runs through one block while its weights are pruned: at once, or stage by stage.

At once: one pass tells what all weights receive in the dense block, as in Wanda, and a second one, behind the pruned
weights, gives the inputs of the next block. Stage by stage: the weights with one input are pruned before the next input
is looked at, so that these see what the pruned ones put out, and the same pass through the parent's block tells what
the input was there. A pass stands still at each stage and is not run again, where memory allows to keep all of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

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
class Feed:
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
        self._replace(hidden for _, hidden, _ in self.activations.batches())

    def propagate_parent(self) -> None:
        """Replace the parent's activations, if there are any, by the outputs of the block as it is now."""
        self._replace(parent for _, _, parent in self.activations.batches() if parent is not None)

    def _replace(self, batches: Iterable[Tensor]) -> None:
        if self.is_last:
            return
        with torch.inference_mode():
            for batch, hidden in enumerate(batches):
                hidden.copy_(self.forward(hidden, batch))


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


class WholePasses:
    """One pass for the statistics of all linears, and one behind the pruned weights, unless they are not propagated."""

    def __init__(self, feed: Feed, *, propagate: bool) -> None:
        self._feed, self._propagate = feed, propagate

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stages(self) -> Groups:
        """Return one stage of all linears."""
        return (self._feed.linears,)

    def collect(self, stage: int) -> Mapping[str, InputStatistics]:
        """Return the statistics of all."""
        feed = self._feed
        collector = StatisticsCollector(
            feed.module, feed.linears, stop_early=self._propagate, gram=feed.gram, first_weight=feed.first_weight
        )
        with collector, torch.inference_mode():
            for batch, hidden, _ in feed.activations.batches():
                output = collector.run(lambda: feed.forward(hidden, batch))  # noqa: B023 - called at once
                if not self._propagate:
                    hidden.copy_(output)
        return collector.results()

    def quieten(self, exponents: Tensor) -> None:
        """Do nothing: what follows runs behind what produces the inputs."""

    def finish(self) -> None:
        """Run the pruned block."""
        if self._propagate:
            self._feed.propagate()


class StagedPasses:
    """One pass for each batch, and one of the parent, that stand still at each stage.

    Parameters
    ----------
    feed
        The block, still dense.
    dense
        The parent's parameters, by their names within the block; empty where the parent does not run.
    waiting
        How many batches' passes wait for the next stage. Those of the others are run again from the start, which gives
        the same.

    Raises
    ------
    ModelError
        When a linear receives no input.
    """

    def __init__(self, feed: Feed, dense: dict[str, Tensor], *, waiting: int) -> None:
        self._feed, self._dense, self._waiting = feed, dense, waiting
        self._groups = groups_by_input(feed.module, feed.linears, feed.probe)
        self._stepper = Stepper(feed.module, self._groups)
        self._ours: dict[int, SteppedPass] = {}
        self._theirs: dict[int, SteppedPass] = {}  # the parent's
        self._factor: Tensor | None = None  # of the inputs at which passes wait
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._stepper)
            stack.callback(self._forget_all)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def stages(self) -> Groups:
        """Return the linears by the input that they share."""
        return self._groups

    def collect(self, stage: int) -> Mapping[str, InputStatistics]:
        """Return the statistics of one input."""
        feed, linears = self._feed, self._groups[stage]
        in_features = feed.module.get_parameter(f"{linears[0]}.weight").shape[1]
        total = InputSum(in_features, feed.device, gram=feed.gram, first_weight=feed.first_weight)
        for batch, hidden, parent in feed.activations.batches():
            theirs = None if parent is None else self._parent_inputs(stage, batch, parent)
            with torch.inference_mode():
                total.add(self._advanced(self._ours, hidden, batch, stage), theirs)
            del theirs
            if parent is not None and stage == len(self._groups) - 1:
                self._finish_parent(batch, parent)
            if batch >= self._waiting:
                self._forget(batch)
        self._factor = None
        return dict.fromkeys(linears, total.result(linears[0]))

    def quieten(self, exponents: Tensor) -> None:
        """Note it for passes that wait with an input that was produced before; others run behind what produces it."""
        self._factor = torch.exp2(-exponents.float())

    def finish(self) -> None:
        """Let all passes go on to their ends."""
        if self._feed.is_last:
            return
        with torch.inference_mode():
            for batch, hidden, _ in self._feed.activations.batches():
                waiting = self._ours.pop(batch, None)
                hidden.copy_(self._feed.forward(hidden, batch) if waiting is None else waiting.finish(self._factor))

    def _advanced(self, passes: dict[int, SteppedPass], hidden: Tensor, batch: int, stage: int) -> Tensor:
        """Return the input of a stage's linears in one batch."""
        waiting = passes.get(batch)
        if waiting is not None:
            return waiting.advance(stage, self._factor if passes is self._ours else None)
        passes[batch] = self._stepper.begin(lambda: self._feed.forward(hidden, batch))
        return passes[batch].advance(stage)

    def _parent_inputs(self, stage: int, batch: int, parent: Tensor) -> ParentInputs:
        with self._dense_weights(), torch.inference_mode():
            inputs = self._advanced(self._theirs, parent, batch, stage)
        return ParentInputs.of(inputs, [self._dense[f"{linear}.weight"] for linear in self._groups[stage]])

    def _finish_parent(self, batch: int, parent: Tensor) -> None:
        ending = self._theirs.pop(batch)
        if self._feed.is_last:
            ending.abandon()
            return
        with self._dense_weights(), torch.inference_mode():
            parent.copy_(ending.finish())

    def _forget(self, batch: int) -> None:
        for passes in (self._ours, self._theirs):
            if batch in passes:
                passes.pop(batch).abandon()

    def _forget_all(self) -> None:
        for batch in {*self._ours, *self._theirs}:
            self._forget(batch)

    @contextmanager
    def _dense_weights(self) -> Iterator[None]:
        """While it is open the block has the parent's parameters."""
        own = {name: parameter.data for name, parameter in self._feed.module.named_parameters()}
        set_parameters(self._feed.module, self._dense)
        try:
            yield
        finally:
            set_parameters(self._feed.module, own)
