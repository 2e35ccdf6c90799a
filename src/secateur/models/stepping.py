"""Forward passes that stand still where linears receive a new input, and go on from there when they are told to.

A method that changes the weights of a block in stages needs the inputs of the first ones, then those that the next ones
receive behind the changed ones, and so on. A pass that waits in between computes nothing twice. It runs in a greenlet:
a stack of its own in the same thread, so that what is on it stays where it is while another one runs.

Modes of torch belong to the thread. Those of the caller, such as `inference_mode`, are to be the same whenever a pass
goes on; one that a block opens around a linear would stay open while the pass waits, and is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from secateur.errors import ModelError

Groups = tuple[tuple[str, ...], ...]


def groups_by_input(block: nn.Module, linears: tuple[str, ...], run: Callable[[], object]) -> Groups:
    """Return some linears of a block by the tensor that they share as input, in the order in which `run` reaches them.

    Of a linear that is called more than once the first call counts.

    Raises
    ------
    ModelError
        When one is never reached.
    """
    groups: list[list[str]] = []
    received: Tensor | None = None  # by the group that is open

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            nonlocal received
            inputs = _input_of(name, arguments)
            is_grouped = any(name in group for group in groups)
            if inputs is not received:  # another input ends the group, also that of a linear that is called again
                received = None if is_grouped else inputs
                if not is_grouped:
                    groups.append([])
            if not is_grouped:
                groups[-1].append(name)

        return note

    handles = [block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in linears]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name in linears:
        if not any(name in group for group in groups):
            raise ModelError(f"{name} received no input in a forward pass, so it cannot be calibrated")
    return tuple(map(tuple, groups))


class Stepper:
    """Makes passes through a block that can stop before each group of its linears.

    Used as a context manager around all of them; other passes are not touched.
    """

    def __init__(self, block: nn.Module, groups: Groups) -> None:
        self._groups = groups
        self._linears = {name: block.get_submodule(name) for group in groups for name in group}
        self._handles: list[Any] = []

    def __enter__(self) -> "Stepper":
        self._handles = [module.register_forward_pre_hook(_reach(name)) for name, module in self._linears.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self, forward: Callable[[], Tensor]) -> "SteppedPass":
        """Return a pass that has not started."""
        return SteppedPass(forward, self._groups)


class SteppedPass(greenlet):
    """One forward pass."""

    def __init__(self, forward: Callable[[], Tensor], groups: Groups) -> None:
        super().__init__(forward)
        self._groups = groups
        self._stage_of = {name: stage for stage, group in enumerate(groups) for name in group}
        self._stage, self._goal = -1, 0
        self._reached: set[str] = set()
        self._inputs: Tensor | None = None
        self._factor: Tensor | None = None

    def advance(self, stage: int, factor: Tensor | None = None) -> Tensor:
        """Go on until the linears of a stage are about to receive their input, and return it.

        Parameters
        ----------
        stage
            A later one than that at which the pass stands.
        factor
            What the input at which the pass stands is multiplied with before the linears of its group receive it, one
            for each feature.

        Raises
        ------
        ModelError
            When the pass differs from that which told the groups, or a mode of torch is open around a linear.
        """
        assert stage > self._stage  # noqa: S101 - a pass does not go back
        modes = _modes()
        found = self._go_on(stage, factor)
        name = self._groups[stage][0]
        if self.dead:
            raise ModelError(f"{name} received an input in one batch but not in another")
        if _modes() != modes:
            raise ModelError(f"{name} runs in a mode of torch, such as autocast, that its block opens; not supported")
        return found

    def finish(self, factor: Tensor | None = None) -> Tensor:
        """Go on to the end, and return the output."""
        return self._go_on(len(self._groups), factor)

    def _go_on(self, stage: int, factor: Tensor | None) -> Tensor:
        self._goal = stage
        found: Tensor = self.switch(factor) if self._inputs is not None else self.switch()
        return found

    def abandon(self) -> None:
        """End a pass that will not go on, and let go of what it holds."""
        if not self.dead:
            self.throw()

    def reach(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Stand still, perhaps, before a linear; return its changed arguments, or None where they stay."""
        inputs, stage = _input_of(name, arguments), self._stage_of[name]
        again = name in self._reached
        self._reached.add(name)
        if stage > self._stage:
            if stage != self._stage + 1 or name != self._groups[stage][0]:
                raise ModelError(f"{name} is reached in another order in one batch than in another")
            self._stage, self._inputs = stage, inputs
            self._factor = None
            if stage >= self._goal:
                assert self.parent is not None  # noqa: S101 - only the main one has none
                self._factor = self.parent.switch(inputs)
        elif stage == self._stage and inputs is not self._inputs and not again:
            first = self._groups[stage][0]
            raise ModelError(f"{name} shared its input with {first} in one batch but not in another")
        if self._factor is None or inputs is not self._inputs:
            return None
        return inputs * self._factor.to(inputs.device, inputs.dtype), *arguments[1:]


def _reach(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def watch(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        current = getcurrent()
        return current.reach(name, arguments) if isinstance(current, SteppedPass) else None

    return watch


def _input_of(name: str, arguments: tuple[Any, ...]) -> Tensor:
    if not arguments:
        raise ModelError(f"{name} receives its input by keyword; not supported")
    found: Tensor = arguments[0]
    return found


def _modes() -> tuple[bool, ...]:
    kinds = ("cpu", "cuda")
    return (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), *map(torch.is_autocast_enabled, kinds))
