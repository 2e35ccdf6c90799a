"""Random weights for the native kernels, with what numpy makes of them, in memory that ends where nothing is mapped."""

import ctypes
import mmap

import numpy as np

from secateur.checkpoint.quantise import CODEBOOKS
from secateur.runtime.kernels import NativeWeight

OFFSETS = {"int8": 128, "int4": 8, "nl4": 128}  # what a kernel takes from the bytes that codes are spread as
CODES = {"int8": 256, "int4": 16, "nl4": 16}
LIBC = ctypes.CDLL(None, use_errno=True)


def before_a_hole(array):
    """Return a copy whose last byte is the last of its page; the next page cannot be read."""
    page = mmap.PAGESIZE
    whole = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, whole + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if LIBC.mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(memory, array.dtype, array.size, offset=whole - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


def bf16(values):
    """Return float32 as the upper 16 bits (truncated), and the floats that they stand for."""
    bits = (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def rounded_to_bf16(x):
    """Return float32 rounded to the nearest bfloat16, even on ties."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def packed_nibbles(codes):
    padded = np.append(codes, 0) if codes.size % 2 else codes
    return (padded[::2] | (padded[1::2] << 4)).astype(np.uint8)


def parts_of(rng, kind, shape, group_size, kept):
    """Return (dense float32 weight, keyword arguments of `NativeWeight`); kept is the fraction, None for dense."""
    rows, cols = shape
    parts = {"kind": kind, "shape": shape}
    if kind in OFFSETS:
        groups = -(-cols // group_size)
        codes = rng.integers(0, CODES[kind], shape, dtype=np.int64)
        scales, floats = bf16(rng.uniform(0.5, 2, (rows, groups)) * rng.choice([-1, 1], (rows, groups)))
        numbers = np.array(CODEBOOKS["nl4"].levels)[codes] if kind == "nl4" else codes - OFFSETS[kind]
        dense = numbers * np.repeat(floats, group_size, axis=1)[:, :cols]
        parts |= {"scales": scales, "group_size": group_size}
    elif kind == "bf16":
        codes, dense = bf16(rng.standard_normal(shape))
    else:
        dense = rng.standard_normal(shape).astype(np.float16)
        dense[rng.random(shape) < 0.02] = np.float16(6e-8)  # a subnormal
        codes = dense.view(np.uint16)
    mask = np.ones(shape, bool)
    if kept is not None:
        mask = rng.random(shape) < kept
        mask[rng.integers(rows)] = False
        mask[rng.integers(rows)] = True
        bitmask = np.zeros((rows, -(-cols // 64) * 8), np.uint8)
        bits = np.packbits(mask, axis=1, bitorder="little")
        bitmask[:, : bits.shape[1]] = bits
        parts["bitmask"] = bitmask
    pieces = [codes[row][mask[row]] for row in range(rows)]
    if kind in ("int4", "nl4"):
        pieces = [packed_nibbles(piece) for piece in pieces]
    if kept is not None:
        parts["row_offsets"] = np.cumsum([0] + [piece.size for piece in pieces]).astype(np.int64)
    parts["values"] = np.concatenate(pieces).astype(np.uint8 if kind in OFFSETS else np.uint16)
    return np.where(mask, dense, 0).astype(np.float32), parts


def random_weight(rng, kind, shape, group_size=64, kept=0.5):
    dense, parts = parts_of(rng, kind, shape, group_size, kept)
    for name, part in parts.items():
        if isinstance(part, np.ndarray):
            parts[name] = before_a_hole(part)
    return dense, NativeWeight(**parts)


def quantised(x):
    """Return what the kernels make of activations: (codes * scales, scale of each column)."""
    n, cols = x.shape
    groups = np.zeros((n, -(-cols // 64) * 64), np.float32)
    groups[:, :cols] = x
    groups = groups.reshape(n, -1, 64)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 1e-30, np.float32(127) / largest, np.float32(0))
    scales = np.where(inverse > 0, largest / np.float32(127), np.float32(0))
    codes = np.rint(groups * inverse)
    return (codes.astype(np.float64) * scales).reshape(n, -1)[:, :cols], np.repeat(scales[..., 0], 64, axis=1)[:, :cols]
