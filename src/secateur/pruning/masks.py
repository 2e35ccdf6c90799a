"""From scores to a mask with an exact number of kept weights.

Selection is by rank, never by threshold: weights that come from a quantised file hold zeros and many equal
magnitudes. Among equal scores the weight with the lower index is removed first, which is what a stable ascending
sort gives.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.config import DEFAULT_CORRECTION, Granularity


@dataclass(frozen=True)
class Target:
    """What a method is asked for.

    Attributes
    ----------
    sparsity
        Fraction to remove, 0 <= sparsity < 1.
    granularity
        The group inside which scores compete.
    seed
        For methods that draw random numbers; differs from weight to weight.
    correction
        For methods that know the parent's inputs: the share of the drift from them that a weight makes up for, 0 to 1.
    """

    sparsity: float
    granularity: Granularity = "per_output"
    seed: int = 0
    correction: float = DEFAULT_CORRECTION


def keep_top(score: Tensor, target: Target) -> Tensor:
    """Keep the highest scores of each group.

    Parameters
    ----------
    score
        float32 [out_features, in_features], finite; higher = keep.
    target
        Each group loses round(sparsity * group size) weights.

    Returns
    -------
    Tensor
        bool [out_features, in_features], True = kept.
    """
    groups = score if target.granularity == "per_output" else score.reshape(1, -1)
    n_removed = round(target.sparsity * groups.shape[1])
    if n_removed == 0:
        return torch.ones(score.shape, dtype=torch.bool)
    scores = groups.cpu().contiguous().numpy()
    # The n-th smallest score of each group; numpy's selection is several times faster than torch's kthvalue.
    threshold = np.partition(scores, n_removed - 1, axis=1)[:, n_removed - 1 : n_removed]
    mask = scores > threshold
    short = (groups.shape[1] - n_removed) - np.count_nonzero(mask, axis=1)
    for row in np.flatnonzero(short):  # groups where some of the scores equal to the threshold are kept
        ties = np.flatnonzero(scores[row] == threshold[row])
        mask[row, ties[len(ties) - short[row] :]] = True
    return torch.from_numpy(mask).reshape(score.shape)


def zero_removed(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the weight with +0 where the mask is False; every kept entry has its own bits.

    weight: [out_features, in_features], two or four bytes an entry; mask: bool, same shape, on the CPU.
    """
    bits = weight.detach().cpu().contiguous().view(torch.int16 if weight.element_size() == 2 else torch.int32).numpy()
    # An integer product is exact and many times faster than torch.where on the CPU.
    product = torch.from_numpy(bits * mask.numpy()).view(weight.dtype)
    return product.to(weight.device)
