"""Whether numbers are finite. Imports nothing but torch: transformers imports it in the middle of its own import."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a float tensor holds neither NaN nor infinity, without a copy of its size.

    A finite sum proves it; a sum can overflow without an infinite entry, so only then each entry is looked at.
    """
    return all(
        bool(torch.isfinite(part.sum(dtype=torch.float32))) or bool(torch.isfinite(part).all())
        for part in torch.split(tensor.detach().reshape(-1), 1 << 20)
    )
