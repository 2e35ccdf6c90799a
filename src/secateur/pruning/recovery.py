"""Recovery: the sub-model learns to give the parent's probabilities again, with its mask kept.

Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) without labels: at every position of a text the
Kullback-Leibler divergence from the parent's next-token probabilities to the sub-model's is lowered, of a large
vocabulary those among the tokens that are likely in such text. What the mask keeps, norms and biases inside the blocks
learn; embedding, head and what lies outside the blocks stay the parent's. Weights that will be stored as integers are
rounded at every step, so that all others learn to make up for it.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.checkpoint.format import Encoding
from secateur.checkpoint.quantise import CODEBOOKS, Quantised, spread_scales
from secateur.errors import ModelError
from secateur.models.finite import all_finite
from secateur.models.safetensors_writer import write_safetensors
from secateur.pruning.likely_tokens import compared, likeliest, total_probabilities, with_tokens

STEP_TOKENS = 1024  # tokens behind one step of the optimiser
# Of how large a weight's kept values are: those of one model are ten times as large as those of another.
LEARNING_RATE = 4e-4
_SMALLEST = 1e-4  # of such a size, so that a bias of zeros can learn
_WARM_UP, _LAST_RATE = 0.05, 0.05  # share of the steps; share of the learning rate
_BETAS, _LARGEST_NORM = (0.9, 0.95), 1.0
# Logits of sequences that run together; the parent's are there too, and as many gradients.
_LOGITS_BYTES = 256 * 2**20
_ROWS = 256  # positions whose probabilities are in float32 at a time
SEEN = 4096  # tokens of the text, and at least a sequence, that tell which tokens the parent finds likely
_SAVE_SECONDS, _SAVE_SHARE = 300.0, 0.05  # at least so long from one save to the next, and at most so much of the time
_MOMENTS = ("exp_avg", "exp_avg_sq")
_PARTS = ("weights", *_MOMENTS)


@dataclass(frozen=True)
class Grid:
    """What a weight of integers can be: multiples of a scale for each group of inputs.

    Attributes
    ----------
    scales
        bfloat16 [out_features, groups], as they are stored.
    mask
        bool [out_features, in_features], True = kept.
    encoding
        Values and group size.
    """

    scales: Tensor
    mask: Tensor
    encoding: Encoding

    def numbers(self, weight: Tensor) -> Tensor:
        """Return the nearest numbers of the codebook, float32 [out_features, in_features]; 0 for what is not kept."""
        scales = self._spread(weight)
        nearest = CODEBOOKS[self.encoding.values].nearest(torch.where(scales == 0, 0.0, weight / scales))
        return nearest.masked_fill_(~self.mask, 0.0)

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the nearest weight, float32 [out_features, in_features]."""
        return self.numbers(weight) * self._spread(weight)

    def quantised(self, weight: Tensor) -> Quantised:
        """Return the nearest weight as it is stored."""
        codes = CODEBOOKS[self.encoding.values].codes(self.numbers(weight), self.mask)
        return Quantised(codes.cpu(), self.scales.cpu())

    def _spread(self, weight: Tensor) -> Tensor:
        return spread_scales(self.scales, self.encoding.group_size, weight.shape[1])


@dataclass(frozen=True)
class Pupil:
    """A sub-model that learns, beside its parent.

    Attributes
    ----------
    model, parent
        Both with all their weights, on one device and in one precision; `model` is trained in place.
    weights
        float32, by name: what learns, in full precision. The model holds a rounded copy.
    masks
        bool, by name, True = kept; a name of `weights` that is missing here learns whole.
    grids
        By name, where the values are integers: what a weight is rounded to. Gradients pass through the rounding as if
        it were not there (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432).
    """

    model: PreTrainedModel
    parent: PreTrainedModel
    weights: Mapping[str, nn.Parameter]
    masks: Mapping[str, Tensor]
    grids: Mapping[str, Grid]

    def weights_of(self, block: str) -> dict[str, Tensor]:
        """Return the weights of one block by name."""
        return {name: one.detach() for name, one in self.weights.items() if name.startswith(f"{block}.")}

    def round(self) -> None:
        """Put the weights into the model, rounded as they will be stored."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                grid = self.grids.get(name)
                self.model.get_parameter(name).copy_(weight if grid is None else grid.nearest(weight))


def recover(pupil: Pupil, token_ids: Tensor, state: Path, progress: Callable[[int, int], None]) -> None:
    """Train a pupil on a set of texts, each of which is seen once.

    Parameters
    ----------
    pupil
        Its `weights` are what the training ends with.
    token_ids
        int64 [sequences, length].
    state
        File in which the state is saved now and then, and at the end. A run that finds one goes on from there, to
        the same weights (on CPUs) as a run that nothing interrupted.
    progress
        Called with the steps that are done, and their number.

    Raises
    ------
    ModelError
        When a gradient is no number any more.
    """
    course = _Course(pupil, token_ids)
    done = course.restore(state)
    pupil.round()
    progress(done, course.steps)
    if done == course.steps:
        return
    tokens = _likely_tokens(pupil.parent, token_ids)
    saved, pause = time.monotonic(), _SAVE_SECONDS
    with with_tokens(pupil.model, tokens), with_tokens(pupil.parent, tokens):
        for step in range(done, course.steps):
            course.take(step)
            if (began := time.monotonic()) - saved >= pause or step + 1 == course.steps:
                course.save(state, step + 1)
                saved = time.monotonic()
                pause = max(_SAVE_SECONDS, (saved - began) / _SAVE_SHARE)
            progress(step + 1, course.steps)


def _likely_tokens(parent: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Return the tokens that are compared: those that the text has, or its parent expects, most often."""
    size = parent.config.get_text_config(decoder=True).vocab_size
    total = torch.bincount(token_ids.flatten(), minlength=size).float().to(parent.device) / token_ids.numel()
    rows = token_ids[:: -(-token_ids.numel() // SEEN)]
    if compared(parent) < size:
        with torch.inference_mode():
            for row in rows:
                inputs = row[None].to(parent.device)
                total += total_probabilities(parent(input_ids=inputs, use_cache=False).logits[0]) / rows.numel()
    return likeliest(parent, total)


class _Course:
    """The optimiser and what it works on."""

    def __init__(self, pupil: Pupil, token_ids: Tensor) -> None:
        self._pupil, self._token_ids = pupil, token_ids
        self._trained = {name: pupil.model.get_parameter(name) for name in pupil.weights}
        for parameter in self._trained.values():
            parameter.requires_grad_(requires_grad=True)
        # Before a state is taken up, so that a run that goes on has the same ones.
        self._rates = [LEARNING_RATE * _size(weight, pupil.masks.get(name)) for name, weight in pupil.weights.items()]
        groups = [{"params": [weight]} for weight in pupil.weights.values()]
        self._optimiser = torch.optim.Adam(groups, lr=0.0, betas=_BETAS, fused=True)
        length = token_ids.shape[1]
        self._sequences = max(1, STEP_TOKENS // length)
        self.steps = -(-len(token_ids) // self._sequences)
        self._together = sequences_together(length, compared(pupil.model), pupil.model.dtype.itemsize)

    def take(self, step: int) -> None:
        """Take one step; raises `ModelError`, before a weight has changed, when its gradient is no number."""
        batch = self._token_ids[step * self._sequences : (step + 1) * self._sequences]
        for number, part in enumerate(torch.split(batch, self._together)):
            distil(self._pupil.model, self._pupil.parent, part, positions=batch.numel())
            self._gather(first=number == 0)
        norm = torch.nn.utils.clip_grad_norm_(list(self._pupil.weights.values()), _LARGEST_NORM)
        if not math.isfinite(norm):
            raise ModelError(f"recovery failed at step {step}: its gradients are no numbers; leave --recover out")
        for group, highest in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = highest * rate(step, self.steps)
        self._optimiser.step()
        self._pupil.round()

    def _gather(self, *, first: bool) -> None:
        """Move the gradients of the rounded weights to those in full precision, where the mask keeps them.

        Those of the first part of a step take the place of the last step's, whose memory is used again.
        """
        for name, weight in self._pupil.weights.items():
            parameter = self._trained[name]
            # What a model has and does not use has no gradient; it stays as it is.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
            if (mask := self._pupil.masks.get(name)) is not None:
                gradient *= mask.view(torch.uint8).to(gradient.dtype)  # from truth values is slow
            if weight.grad is None:
                weight.grad = gradient.float()
            elif first:
                weight.grad.copy_(gradient)
            else:
                weight.grad.add_(gradient)

    def save(self, path: Path, step: int) -> None:
        """Write weights and moments; the file appears whole or not at all."""
        tensors = {f"{name}.weights": weight.data for name, weight in self._pupil.weights.items()}
        for name, weight in self._pupil.weights.items():
            tensors |= {f"{name}.{kind}": self._optimiser.state[weight][kind] for kind in _MOMENTS}
        write_safetensors(
            path, {name: one.cpu() for name, one in tensors.items()}, {"step": str(step), "steps": str(self.steps)}
        )

    def restore(self, path: Path) -> int:
        """Take up a saved state, and return the number of steps behind it; 0 when there is none that is whole."""
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                step = int(said["step"])
                # Copies: the file is replaced while they are in use.
                stored = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, KeyError, ValueError):
            return 0
        wanted = {f"{name}.{kind}": one for name, one in self._pupil.weights.items() for kind in _PARTS}
        if said.get("steps") != str(self.steps) or not 0 < step <= self.steps or stored.keys() != wanted.keys():
            return 0
        for key, one in stored.items():
            if one.shape != wanted[key].shape or one.dtype != torch.float32 or not all_finite(one):
                return 0
        for name, weight in self._pupil.weights.items():
            weight.data.copy_(stored[f"{name}.weights"])
            state = {kind: stored[f"{name}.{kind}"].to(weight.device) for kind in _MOMENTS}
            self._optimiser.state[weight] = {"step": torch.tensor(float(step), device=weight.device), **state}
        return step


def _size(weight: Tensor, mask: Tensor | None) -> float:
    """Return the root mean square of what is kept of a matrix, the median size of others: few biases may be huge."""
    with torch.no_grad():
        if weight.ndim < 2:
            return max(_SMALLEST, float(weight.abs().median()))
        count = weight.numel() if mask is None else int(mask.sum())
        total = float(weight.square().sum() if mask is None else (weight * mask).square().sum())
    return max(_SMALLEST, math.sqrt(total / max(1, count)))


def distil(model: PreTrainedModel, parent: PreTrainedModel, token_ids: Tensor, *, positions: int) -> None:
    """Add the gradients of the divergence from the parent, its sum divided by `positions`, to those of the model."""
    token_ids = token_ids.to(model.device)
    with torch.no_grad():
        wanted = parent(input_ids=token_ids, use_cache=False).logits
    logits = model(input_ids=token_ids, use_cache=False).logits
    gradient = torch.empty_like(logits)
    with torch.no_grad():
        rows = [one.detach().flatten(0, 1).split(_ROWS) for one in (logits, wanted, gradient)]
        for ours, theirs, slope in zip(*rows, strict=True):
            found = ours.softmax(-1, dtype=torch.float32)
            slope.copy_(found.sub_(theirs.softmax(-1, dtype=torch.float32)).div_(positions))
    logits.backward(gradient)


def sequences_together(length: int, tokens: int, itemsize: int) -> int:
    """Return how many sequences run in one pass, by the tokens compared: those of a step, if their logits are small."""
    return max(1, min(STEP_TOKENS // length, _LOGITS_BYTES // (tokens * length * itemsize)))


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the highest: a linear rise, then half a cosine."""
    rise = max(1, round(_WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    past = (step - rise) / max(1, steps - rise)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * past))
