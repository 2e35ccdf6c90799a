"""What a block's inputs look like: the sum of squares of each input feature of each prunable weight, or of all pairs.

Weights that read one tensor (q, k and v; gate and up) share one statistic. Sums of squares are taken over slices of
rows in float32 and added in float64, so that neither the batch size nor the number of tokens costs accuracy.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.models.products import product_precision

# Rows converted to float32 at a time: the slice stays in the cache, which makes this several times faster than
# converting a whole activation.
_ROWS = 256
# The same for products of all pairs of features, which are worth it only for many rows at a time.
_GRAM_ROWS = 2048
# And so many features against all behind them.
_GRAM_COLUMNS = 512


@dataclass(frozen=True)
class InputStatistics:
    """Sums over all calibration tokens of one weight's input.

    Attributes
    ----------
    sum_squares
        float32 [in_features]; for each feature j the sum of x_j^2 over tokens.
    n_tokens
        Number of tokens that were summed.
    gram
        float32 [in_features, in_features], symmetric: the sum of x_i x_j over tokens, in which the first token of each
        sequence may count as many; None where nobody asked for it.
    cross
        float32 [in_features, in_features]: the sum of z_i x_j, where z is what the same input was in the parent; None
        where that is not known.
    parent_outputs
        float32 [out_features, in_features]: V times `cross`, where V is the parent's weight. It stands in the place of
        `cross` when one weight alone has the input and at most half as many outputs as inputs: then it takes less work.
    """

    sum_squares: Tensor
    n_tokens: int
    gram: Tensor | None = None
    cross: Tensor | None = None
    parent_outputs: Tensor | None = None

    def loudness(self) -> Tensor:
        """Return the sum of squares of each feature, float32 [in_features]; tokens count as in the Gram matrix."""
        return self.sum_squares if self.gram is None else self.gram.diagonal()

    def quieter(self, exponents: Tensor) -> "InputStatistics":
        """Return those of the same input with feature j divided by 2^exponents[j], which takes this one's matrices."""
        scale = torch.exp2(-exponents.float())
        with torch.inference_mode():  # in which they were summed
            for matrix in (self.gram, self.cross):
                if matrix is not None:
                    matrix.mul_(scale.to(matrix.device)).mul_(scale.to(matrix.device)[:, None])
            if self.parent_outputs is not None:  # which stay what they are: the weight is louder by as much
                self.parent_outputs.mul_(scale.to(self.parent_outputs.device))
        return replace(self, sum_squares=self.sum_squares * scale * scale)

    @property
    def input_norms(self) -> Tensor:
        """float32 [in_features]: ||x_j||_2 over all tokens (Sun et al. 2024, eq. 1)."""
        return self.sum_squares.sqrt()


@dataclass(frozen=True)
class ParentInputs:
    """What an input was in the parent.

    Attributes
    ----------
    inputs
        [..., in_features], token by token beside what is summed.
    weight
        The parent's [out_features, in_features], if products with its outputs are summed and not with inputs.
    """

    inputs: Tensor
    weight: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensor, weights: Sequence[Tensor]) -> "ParentInputs":
        """Return those of the weights that share the input: with the outputs where that takes less work."""
        alone = len(weights) == 1 and 2 * weights[0].shape[0] <= weights[0].shape[1]
        return cls(inputs, weights[0] if alone else None)

    def first_tokens(self) -> "ParentInputs":
        """Return those of the first token of each sequence."""
        return ParentInputs(self.inputs[:, :1], self.weight)

    def rows(self) -> Iterator[Tensor]:
        """Give float32 [tokens, features] of inputs or outputs, a slab at a time."""
        weight = None if self.weight is None else self.weight.float().T
        for slab in torch.split(self.inputs.detach().flatten(0, -2), _GRAM_ROWS):
            yield slab.float() if weight is None else slab.float() @ weight


class InputSum:
    """A running sum for one input; with `gram` also of products, in which first tokens count as `first_weight` ones."""

    def __init__(self, in_features: int, device: torch.device, *, gram: bool, first_weight: float) -> None:
        self.first_weight = first_weight
        self.total = torch.zeros(in_features, dtype=torch.float64)
        self.gram = torch.zeros(in_features, in_features, device=device) if gram else None
        self.cross: Tensor | None = None
        self.of_outputs = False
        self.n_tokens = 0

    def add(self, inputs: Tensor, parents: ParentInputs | None = None) -> None:
        """Add a batch of inputs [..., in_features]; the first token is the first of [batch, sequence, in_features]."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        for part in torch.split(rows, _ROWS):
            # A copy even of float32 inputs: they are what the block goes on computing with.
            squares = part.to(torch.float32, copy=True).square_()
            self.total += squares.sum(0).to("cpu", torch.float64)
        if self.gram is not None:
            self._add_products(inputs, parents, 1.0)
            if self.first_weight != 1 and inputs.dim() > 2:
                first = None if parents is None else parents.first_tokens()
                self._add_products(inputs[:, :1], first, self.first_weight - 1)
        self.n_tokens += rows.shape[0]

    def _add_products(self, inputs: Tensor, parents: ParentInputs | None, times: float) -> None:
        assert self.gram is not None  # noqa: S101 - the only caller has looked
        slabs = torch.split(inputs.detach().flatten(0, -2), _GRAM_ROWS)
        # Products of bfloat16 numbers that lie in float32 are exact in bfloat16 units too.
        exact: Literal["highest", "medium"] = "medium" if inputs.dtype == torch.bfloat16 else "highest"
        with product_precision(exact, inputs.device):
            for slab in map(Tensor.float, slabs):
                for column in range(0, slab.shape[1], _GRAM_COLUMNS):  # what lies above the diagonal is enough
                    part = slice(column, column + _GRAM_COLUMNS)
                    self.gram[part, column:].addmm_(slab[:, part].T, slab[:, column:], alpha=times)
        if parents is None:
            return
        with product_precision(exact if parents.weight is None else "highest", inputs.device):
            for slab, theirs in zip(map(Tensor.float, slabs), parents.rows(), strict=True):
                if self.cross is None:
                    self.cross = theirs.new_zeros(theirs.shape[1], slab.shape[1])
                self.cross.addmm_(theirs.T, slab, alpha=times)
        self.of_outputs = parents.weight is not None

    def result(self, name: str) -> InputStatistics:
        """Return what was summed; `name` is that of a weight, for errors.

        Raises
        ------
        ModelError
            When inputs were not finite.
        """
        total = self.total.float()
        if not bool(torch.isfinite(total).all()):
            raise ModelError(f"the inputs of {name} are not finite: the model overflows in its precision")
        gram = None if self.gram is None else self.gram.triu() + self.gram.triu(1).T
        cross, outputs = (None, self.cross) if self.of_outputs else (self.cross, None)
        return InputStatistics(total, self.n_tokens, gram, cross, outputs)


class StatisticsCollector:
    """Watches the inputs of a block's linear modules while the block runs.

    Used as a context manager around the forward passes; `results()` afterwards. With `stop_early` the forward pass
    ends by raising `AllCollected` once the last of the weights has received its input, because what the block would
    compute after that changes no statistic. With `gram` the products of all pairs of features are summed too; there the
    first token of each sequence counts as `first_weight` tokens, where inputs are [batch, sequence, features].
    """

    def __init__(
        self,
        block: nn.Module,
        linears: tuple[str, ...],
        *,
        stop_early: bool,
        gram: bool = False,
        first_weight: float = 1.0,
    ) -> None:
        self._linears = {name: block.get_submodule(name) for name in linears}
        self._stop_early, self._gram, self._first_weight = stop_early, gram, first_weight
        self._sums: dict[str, InputSum] = {}
        self._leader: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None
        self._calls: list[str] = []
        self._last_called: str | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> "StatisticsCollector":
        self._handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._linears.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._last = [], None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs = arguments[0]
            if self._last is not None and self._last[1] is inputs:
                leader = self._last[0]
            else:
                leader = name
                self._last = (name, inputs)
                if name not in self._sums:
                    self._sums[name] = InputSum(
                        inputs.shape[-1], inputs.device, gram=self._gram, first_weight=self._first_weight
                    )
                self._sums[name].add(inputs)
            if self._leader.setdefault(name, leader) != leader:
                raise ModelError(f"{name} shared its input with {self._leader[name]} in one batch but not in another")
            self._calls.append(name)
            if name == self._last_called:
                raise AllCollected

        return watch

    def run(self, forward: Callable[[], Any]) -> Any:
        """Run one forward pass and return its output, or None where it was stopped early."""
        self._calls.clear()
        self._last = None
        try:
            output = forward()
        except AllCollected:
            output = None
        if self._stop_early and self._last_called is None:
            self._last_called = self._only_last_call()
        return output

    def _only_last_call(self) -> str | None:
        """The module called last in a whole pass, if each was called once: only then may later passes end there."""
        return self._calls[-1] if len(set(self._calls)) == len(self._calls) == len(self._linears) else None

    def results(self) -> dict[str, InputStatistics]:
        """Return the statistics by linear name; weights with one input share one object.

        Raises
        ------
        ModelError
            When a weight was never used, or its inputs were not finite.
        """
        for name in self._linears:
            if name not in self._leader:
                raise ModelError(f"{name} received no input in a forward pass, so it cannot be calibrated")
        done = {name: one.result(name) for name, one in self._sums.items()}
        return {name: done[leader] for name, leader in self._leader.items()}


class AllCollected(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass that has nothing more to tell."""
