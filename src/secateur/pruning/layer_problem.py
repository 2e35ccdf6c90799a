"""The problem that methods with a Gram matrix solve for one weight, and the best values for a mask that is given.

Of all sparse W the one is sought whose products with the calibration inputs X are nearest to those of the dense V:
minimise ||(W - V) X||_F^2 = tr((W - V) G (W - V)^T) with G = X X^T. Columns are scaled by the norms of their inputs, so
that G has a diagonal of ones, a damping means the same everywhere, and |W_ij| is the score of Wanda.

Behind pruned blocks the inputs X are no longer those of the parent, Z. Where both are known the products W X are to be
near to V ((1 - c) X + c Z), so that W makes up for a part of what has gone wrong before it. Only V G changes then, to
V ((1 - c) G + c Z X^T).

The fewer tokens there are for each feature, the less a product of two features tells of other text. So the damping is
the number of features over that of tokens, as of a ridge regression whose error is as large as what it explains.
"""

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.calibration.statistics import InputStatistics
from secateur.config import DEFAULT_CORRECTION
from secateur.errors import ModelError

logger = logging.getLogger(__name__)
DAMPING = 0.01  # of the diagonal, at least (Frantar & Alistarh 2023, section 3.3)
_MAX_DAMPING = 1.0
_SINGULAR = "the inputs of a weight have a Gram matrix that cannot be inverted; prune it with wanda"


def damping_of(statistics: InputStatistics) -> float:
    """Return what is added to the diagonal of a Gram matrix that is scaled to a diagonal of ones."""
    return min(_MAX_DAMPING, max(DAMPING, len(statistics.sum_squares) / statistics.n_tokens))


@dataclass(frozen=True)
class LayerProblem:
    """The least squares of one weight.

    Attributes
    ----------
    dense
        float32 [out_features, in_features]: the dense weight, columns scaled. Those of inputs that were always 0 are 0.
    gram
        float32 [in_features, in_features]: the scaled Gram matrix, with its damping; the diagonal is 1 + `damping_of`.
    norms
        float32 [in_features]: what columns were multiplied with; 1 for inputs that were always 0.
    aim
        float32 [out_features, in_features]: what W G should be. That is V G, but for the drift of the inputs.
    dead
        bool [in_features]: the inputs that were always 0.
    """

    dense: Tensor
    gram: Tensor
    norms: Tensor
    aim: Tensor
    dead: Tensor

    @classmethod
    def of(cls, weight: Tensor, statistics: InputStatistics, correction: float = DEFAULT_CORRECTION) -> "LayerProblem":
        """Scale a weight [out_features, in_features] and the Gram matrix of its inputs; `correction` is c above."""
        assert statistics.gram is not None  # noqa: S101 - the pipeline gives what `needs` names
        gram = statistics.gram.to(weight.device)
        norms = gram.diagonal().sqrt()
        alive = norms > 0
        norms = torch.where(alive, norms, torch.ones_like(norms))
        scaled = gram / norms / norms[:, None]
        scaled.diagonal().fill_(1 + damping_of(statistics))
        dense = weight.float() * norms * alive
        aim = dense @ scaled
        outputs = statistics.parent_outputs
        if statistics.cross is not None:
            outputs = weight.float() @ statistics.cross.to(weight.device)
        if outputs is not None:
            undamped = aim - dense * damping_of(statistics)
            aim += (outputs.to(weight.device) / norms - undamped) * correction
        return cls(dense, scaled, norms, aim, ~alive)

    def restored(self, scaled: Tensor, original: Tensor) -> Tensor:
        """Return a scaled weight in the scale and precision of the original.

        What belongs to inputs that were always 0 is the original's: nothing is known of it.
        """
        found = (scaled / self.norms).to(original.dtype)
        return torch.where(self.dead, original, found) if bool(self.dead.any()) else found

    def at_rest(self, weight: Tensor) -> "LayerProblem":
        """Return the same problem, in which weights of inputs that were always 0 should be those of a scaled weight."""
        return replace(self, aim=torch.where(self.dead, weight * self.gram.diagonal(), self.aim))

    def best_dense(self) -> Tensor:
        """Return the solution without a mask: the dense weight, but for the drift of the inputs."""
        lower = cholesky(self.gram.double())
        return torch.cholesky_solve(self.aim.double().T, lower).T.float().contiguous()

    def factor(self) -> Tensor:
        """Return the Cholesky factor [in_features, in_features] of the inverse of the Gram matrix, upper, float32.

        More damping is added, tenfold each time, where rounding has left the matrix indefinite; a warning says so.

        Raises
        ------
        ModelError
            When even a damping as large as the diagonal does not help: the inputs are not finite.
        """
        gram, added = self.gram.double(), 0.0
        while added <= _MAX_DAMPING:
            raised = gram.clone()
            raised.diagonal().add_(added)
            lower, failed = torch.linalg.cholesky_ex(raised)
            if not failed:
                inverse = torch.cholesky_inverse(lower)
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not failed:
                    if added:
                        logger.warning(
                            "a Gram matrix of %d inputs was indefinite: %g of its diagonal was added", len(gram), added
                        )
                    factor: Tensor = upper.float()
                    return factor
            added = 10 * added or DAMPING
        raise ModelError(_SINGULAR)


def cholesky(gram: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a damped Gram matrix.

    Raises
    ------
    ModelError
        When there is none: the inputs are not finite.
    """
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise ModelError(_SINGULAR)
    found: Tensor = lower
    return found


def refit(problem: LayerProblem, scaled: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Return the weight, zero outside the mask, that `steps` of conjugate gradients from a scaled weight lead to.

    Each row is a problem of its own. The error never grows: for a row that has converged nothing is done any more.
    """
    kept = mask.to(scaled.dtype)
    found = scaled * kept
    residual = (problem.aim - found @ problem.gram) * kept
    direction, size = residual.clone(), residual.square().sum(1, keepdim=True)
    tiny = 1e-12 * problem.dense.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(steps):
        image = direction @ problem.gram * kept
        length = size / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        length = torch.where(size > tiny, length, torch.zeros_like(length))
        found += length * direction
        residual -= length * image
        following = residual.square().sum(1, keepdim=True)
        ratio = torch.where(size > tiny, following / size.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        direction, size = residual + ratio * direction, following
    return found
