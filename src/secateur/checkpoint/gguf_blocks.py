"""Weights as the bytes that a GGUF holds: floats, or blocks of 32 consecutive inputs with a scale (float16).

A block of Q8_0 is the scale and 32 int8; one of Q4_0 or IQ4_NL the scale and 16 bytes, the code of entry i in the
low half of byte i and that of entry i + 16 in the high half. Scales of a sub-model span one block or several.
"""

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from secateur.checkpoint.format import Encoding
from secateur.checkpoint.quantise import CODEBOOKS, Quantised
from secateur.errors import CheckpointError, ConfigError
from secateur.models.finite import all_finite

BLOCK = 32

_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# Elements that are quantised at once: 16 MB in float32.
_CHUNK_ELEMENTS = 1 << 22
# The scale of a block of Q8_0 is a float16, and its codes go up to 127.
_LARGEST_IN_Q8_0 = 127 * 65504.0


def from_floats(tensor: Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """Return a tensor as F32, F16, BF16 or Q8_0, each entry rounded once.

    Raises
    ------
    CheckpointError
        When the tensor holds NaN or infinity.
    ConfigError
        When an entry is too large for the type.
    """
    if not all_finite(tensor):
        raise CheckpointError(f"weight {name!r} holds NaN or infinity; derive or fetch the sub-model again")
    if kind in _DTYPES:
        rounded = tensor.to(_DTYPES[kind]).contiguous()
        if not all_finite(rounded):
            raise _out_of_range(name, "large", kind)
        # numpy has no bfloat16; the bits are the same.
        array: np.ndarray = (rounded.view(torch.int16) if rounded.dtype == torch.bfloat16 else rounded).numpy()
        return array
    if max(map(abs, map(float, torch.aminmax(tensor)))) > _LARGEST_IN_Q8_0:
        raise _out_of_range(name, "large", kind)
    rows = max(1, _CHUNK_ELEMENTS // tensor.shape[1])
    blocks = [quantize(tensor[begin : begin + rows].float().numpy(), kind) for begin in range(0, len(tensor), rows)]
    return np.concatenate(blocks)


def from_integers(quantised: Quantised, encoding: Encoding, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """Return a weight stored as integers as Q8_0 or, if it is int4 or nl4, as Q4_0 or IQ4_NL: the same numbers.

    in_features is a multiple of 32. Of a scale below 2^-17 float16 keeps fewer than the 8 digits of bfloat16.

    Raises
    ------
    ConfigError
        When a scale is too large or too small for float16.
    """
    codes = quantised.codes.numpy()
    n_blocks = codes.shape[1] // BLOCK
    scales = quantised.scales.to(torch.float16)
    if not all_finite(scales):
        raise _out_of_range(name, "large", kind)
    if bool(((scales == 0) & (quantised.scales != 0)).any()):
        raise _out_of_range(name, "small", kind)
    blocks = np.repeat(scales.numpy(), encoding.group_size // BLOCK, axis=1)[:, :n_blocks, None].view(np.uint8)
    codes = codes.reshape(len(codes), n_blocks, BLOCK)
    if kind != GGMLQuantizationType.Q8_0:
        codes = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    else:
        book = CODEBOOKS[encoding.values]
        if book.levels is None:
            codes = codes - np.uint8(book.offset)  # modulo 256, so the bits are those of int8
        else:
            codes = np.array((*book.levels, 0), dtype=np.int8).view(np.uint8)[codes]
    return np.concatenate([blocks, codes], axis=2).reshape(len(codes), -1)


def _out_of_range(name: str, size: str, kind: GGMLQuantizationType) -> ConfigError:
    return ConfigError(f"weight {name!r} holds a value that is too {size} for {kind.name}; export with `--type bf16`")
