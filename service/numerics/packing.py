"""Codes in memory: strips of 16 output rows, and in them tiles of 32 input columns.

Both sizes are padded with codes 0. A weight [out, in] has S = ceil(out / 16) strips of T = ceil(in / 32) tiles each,
of 64 bytes for each bit of a code; a strip's tiles follow one another from left to right:

          in -->
    out   tile 0      tile 1      ...
     |    tile T      tile T + 1  ...          tile = 16 outputs x 32 columns
     v    tile 2 T    ...

Kernels multiply pairs of neighbouring columns, so that the bytes of a tile run through the outputs before they
run through the pairs. For 8 bit, four outputs and two pairs at a time, as `oO:cC` (output, columns):

    byte   0  00:00 00:01  01:00 01:01  02:00 02:01  03:00 03:01   00:02 00:03  01:02 01:03  02:02 02:03  03:02 03:03
    byte  16  the same of outputs 4 to 7, then 8 to 11 and 12 to 15
    byte  64  the same of columns 4 to 7, and so on

For 4 bit, the eight codes c0..c7 of one output and columns 8z .. 8z+7 are one little-endian 32-bit word, even columns
in the low half; the word of output o and columns 8z is word 16 z + o of the tile:

    bits    31..28  27..24  23..20  19..16    15..12  11..8   7..4    3..0
    code      c7      c5      c3      c1        c6      c4      c2      c0

2 bit goes on likewise: sixteen codes in a word, the even columns in the low half. 1 bit has eight codes in a byte: in
byte 32 h + 2 o + p those of output o and columns 16 h + p, 16 h + p + 2 and so on. Codes of 3, 5 and 6 bits lie in two
such planes; a half of a tile, 16 columns, has first its part of the low bits and then that of the high ones:

    bits     2       3       4       5       6
    planes   2       2 + 1   4       4 + 1   4 + 2

Scales and zero points of a strip lie group by group, the 16 outputs side by side; zero points of up to 4 bits are
nibbles, the lower output in the low bits. All of it needs a little-endian machine, as all that torch runs on are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

STRIP: Final = 16
K_TILE: Final = 32
PLANES: Final = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}
"""Bits of the planes that codes lie in, low bits first."""

_BIT_BYTES: Final = STRIP * K_TILE // 8  # of a tile, for each bit of its codes


def num_strips(out_features: int) -> int:
    """Strips of a weight."""
    return -(-out_features // STRIP)


def num_tiles(in_features: int) -> int:
    """Tiles of a strip."""
    return -(-in_features // K_TILE)


def pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """Lay out codes in tiles; bits is 8 or one of `PLANES`.

    Args:
        codes: int8[S * 16, T * 32], or uint8 below 2**bits for fewer than 8.

    Returns:
        int8[S, T * 512], or uint8[S, T * 64 * bits].
    """
    strips = len(codes) // STRIP
    if bits == 8:
        pairs = codes.contiguous().view(torch.int16).view(strips, STRIP, -1, 2)
        tiles = torch.empty(strips, codes.shape[1] * STRIP, dtype=torch.int8, device=codes.device)
        places = _pairs(tiles)
        for output in range(STRIP):  # takes half as long as one permutation, whose innermost runs would be of four
            places[:, :, output // 4, :, output % 4] = pairs[:, output]
        return tiles
    planes, shift = [], 0
    for width in PLANES[bits]:
        words = _to_words(codes >> shift & (1 << width) - 1 if len(PLANES[bits]) > 1 else codes, width)
        planes.append(_to_halves(words.view(strips, STRIP, -1, width), width))
        shift += width
    return torch.cat(planes, 3).view(strips, -1)


def unpack_tiles(tiles: Tensor, bits: int) -> Tensor:
    """Undo `pack_tiles`: the codes [S * 16, T * 32] of all strips, or of some that follow one another."""
    strips = len(tiles)
    if bits == 8:
        pairs = _pairs(tiles).permute(0, 2, 4, 1, 3).contiguous()
        return pairs.view(strips * STRIP, -1).view(torch.int8)
    planes = (
        _from_words(words.permute(0, 3, 1, 2).reshape(strips * STRIP, -1), width)
        for words, width in _planes(tiles, bits)
    )
    return _joined(planes, bits)


def unpack_rows(tiles: Tensor, rows: Tensor, bits: int) -> Tensor:
    """Codes [n, T * 32] of the output rows int[n], without a look at others."""
    strip, output = rows // STRIP, rows % STRIP
    if bits == 8:
        return _pairs(tiles)[strip, :, output // 4, :, output % 4].flatten(1).view(torch.int8)
    planes = (_from_words(words[strip, :, :, output].flatten(1), width) for words, width in _planes(tiles, bits))
    return _joined(planes, bits)


def to_strips(values: Tensor) -> Tensor:
    """Bring values of groups [S * 16, G] into the order of scales: [S, G, 16]."""
    return values.view(-1, STRIP, values.shape[1]).transpose(1, 2)


def from_strips(values: Tensor) -> Tensor:
    """Undo `to_strips`."""
    return values.transpose(1, 2).flatten(0, 1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack uint8[..., 2 n] below 16 into uint8[..., n], the first of two in the low bits."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _pairs(tiles: Tensor) -> Tensor:
    """8-bit tiles as pairs of columns: int16[strip, z, fours of outputs, pair, output of the four]."""
    return tiles.view(torch.int16).view(len(tiles), -1, 4, 2, 4)


def _to_halves(words: Tensor, width: int) -> Tensor:
    """Words int32[strip, output, tile, width] as the bytes [strip, tile, half, byte] of a plane."""
    strips, _, tiles, _ = words.shape
    if width > 1:
        return words.permute(0, 2, 3, 1).contiguous().view(torch.uint8).view(strips, tiles, 2, -1)
    parts = words[..., 0].contiguous().view(torch.uint8).view(strips, STRIP, tiles, 2, 2)  # [..., parity, half]
    return parts.permute(0, 2, 4, 1, 3).reshape(strips, tiles, 2, -1)


def _planes(tiles: Tensor, bits: int) -> Iterator[tuple[Tensor, int]]:
    """Of each plane int32[strip, tile, word of an output, output], and its bits."""
    halves = tiles.view(len(tiles), -1, 2, bits * _BIT_BYTES // 2)
    first = 0
    for width in PLANES[bits]:
        part = halves[..., first : first + width * _BIT_BYTES // 2]
        if width == 1:
            part = part.view(len(tiles), -1, 2, STRIP, 2).permute(0, 1, 3, 4, 2)
        yield (
            part.reshape(len(tiles), -1, width * _BIT_BYTES).view(torch.int32).view(len(tiles), -1, width, STRIP),
            width,
        )
        first += width * _BIT_BYTES // 2


def _joined(planes: Iterator[Tensor], bits: int) -> Tensor:
    """Codes from the parts that the planes hold."""
    low, *high = planes
    return low | high[0] << PLANES[bits][0] if high else low


def _to_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8[rows, n] of 1, 2 or 4 bits to int32[rows, n * bits / 32]."""
    codes = codes.contiguous()
    while bits < 4:  # two columns c0 c1 and the next two, to c0 + c2 << bits and c1 + c3 << bits
        pairs = codes.view(torch.int32)
        mask = (1 << 2 * bits) - 1
        codes = (pairs | pairs >> 16 - bits).bitwise_and_(mask << 8 | mask).to(torch.int16).view(torch.uint8)
        bits *= 2
    eights = codes.view(torch.int64)
    eights = eights | eights >> 12  # bytes 0, 1, 4, 5: codes 2:0, 3:1, 6:4, 7:5
    low = (eights & 0xFF) | (eights >> 24 & 0xFF00)
    high = (eights << 8 & 0xFF0000) | (eights >> 16 & 0xFF000000)
    return (low | high).to(torch.int32)


def _from_words(words: Tensor, bits: int) -> Tensor:
    """Undo `_to_words`: uint8[rows, n]."""
    shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=words.device)
    mask = (1 << bits) - 1
    pairs = words[..., None] >> shifts & (mask << 16 | mask)
    return (pairs | pairs >> 8).to(torch.int16).flatten(1).view(torch.uint8)  # the cast keeps the low half
