"""Modules that stand in the places of `nn.Linear` and `nn.Embedding` and compute with packed weights.

They are for inference. A weight that is trained has to be unpacked: open the sub-model with transformers.
"""

import copy

import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.runtime.packed_matrix import PackedMatrix


class SparseLinear(nn.Module):
    """A linear layer whose weight stays packed.

    Takes float x [..., in_features] and returns [..., out_features] of the same dtype. On the CPU a native kernel
    computes it: with integer weights it rounds x to signed bytes with a scale for each 64 columns, with bfloat16 ones
    to bfloat16; sums are float32. On another device, for float32 weights, and without native code, torch unpacks the
    weight in x's precision for this one product.

    Attributes
    ----------
    in_features, out_features, bias
        As `nn.Linear` has them.
    packed
        The weight; another module may hold the same one.

    Raises
    ------
    ModelError
        When a gradient is asked for.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: PackedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.packed = packed
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features], unpacked anew at each call: a copy, which nothing keeps."""
        return self.packed.unpack()

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x has shape {list(x.shape)}, expected [..., {self.in_features}]")
        _refuse_gradient(self.packed, x, self.bias)
        rows = x.reshape(-1, self.in_features)
        if not len(rows):
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self.packed.multiply(rows, self.bias).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        values = self.packed.encoding.values
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {values}"
        )


class PackedEmbedding(nn.Module):
    """An embedding that stays packed: only the rows that are asked for are dequantised.

    Attributes
    ----------
    num_embeddings, embedding_dim
        As `nn.Embedding` has them.
    packed
        A dense matrix [num_embeddings, embedding_dim]; a tied head holds the same one.
    lookup
        The module of the architecture, without its weight: some families scale what they look up.
    """

    def __init__(self, packed: PackedMatrix, lookup: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.shape
        self.packed, self.lookup = packed, lookup
        lookup.padding_idx = None  # it only matters for gradients, and would be looked for among the few rows

    @property
    def weight(self) -> Tensor:
        """The whole matrix, unpacked anew at each call: a copy, which nothing keeps."""
        return self.packed.unpack()

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the rows [..., embedding_dim] of token ids [...], as the architecture's own module makes them."""
        _refuse_gradient(self.packed)
        rows = self.packed.look_up(token_ids.flatten())
        places = torch.arange(len(rows), device=rows.device).view(token_ids.shape)
        # A copy of the module holds the rows: other threads look up theirs in this one meanwhile.
        lookup = copy.copy(self.lookup)
        lookup._parameters = {name: one for name, one in lookup._parameters.items() if name != "weight"}
        lookup._buffers = {**lookup._buffers, "weight": rows}
        found: Tensor = lookup(places)
        return found


def _refuse_gradient(packed: PackedMatrix, *tensors: Tensor | None) -> None:
    """Raise where a result without a gradient would be wrong without anyone noticing."""
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (packed.precision, *tensors)):
        raise ModelError(
            f"packed weight {packed.name!r} has no gradient: run the model under torch.inference_mode(), or open the "
            "sub-model with transformers, which unpacks it, to train it"
        )
