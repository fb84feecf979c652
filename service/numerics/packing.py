"""Codes in memory: 8-bit codes one per byte, 4-bit codes two per byte, the first one in the low bits.

    codes     c0  c1  c2  c3  c4 ...                     (uint8, 0..15)
    byte 0    c1 << 4 | c0          bit  7 6 5 4 | 3 2 1 0
    byte 1    c3 << 4 | c2                 c1    |   c0

A row of packed weights is padded with codes 0 to a multiple of `K_TILE` codes. Whatever the zero point, the
padding never meets an activation: readers cut a row to its width. Zero points are packed alike, padded to a byte.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

K_TILE: Final = 32


def padded_width(in_features: int) -> int:
    """Codes per row of packed weights, padding included."""
    return -(-in_features // K_TILE) * K_TILE


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8[rows, n] codes below 2**bits into uint8[rows, ceil(n * bits / 8)]; bits is 4 or 8.

    The unused high bits of a last byte are 0. 4 bits: needs a little-endian machine, as all that torch runs on are.
    """
    if bits == 8:
        return codes
    pairs = functional.pad(codes, (0, codes.shape[1] % 2)).contiguous().view(torch.int16)  # c1 << 8 | c0
    return (pairs | pairs >> 4).to(torch.uint8)  # the cast keeps the low byte


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Unpack uint8[rows, bytes] into uint8[rows, bytes * 8 / bits] codes; bits is 4 or 8."""
    if bits == 8:
        return packed
    pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
    return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
