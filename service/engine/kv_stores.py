"""The formats in which keys and values are stored: as they come, or as int8 codes with scales.

A store holds the rows `[kv_heads, size]` of one layer's keys, or of its values, in blocks. A slot is
`block * block_size + offset`. Memory is not touched before it is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from service.engine.config import KVFormat
from service.kernels.native_attention import Stored

_LARGEST_CODE = 127
_SCALE_DTYPE = torch.bfloat16
"""Two bytes with the range of float32: no row is too small or too large for its scale."""
_SCALE_BITS = 8
"""Significant bits of a scale."""
_SMALLEST_SCALE = torch.finfo(_SCALE_DTYPE).tiny


class KVStore(Protocol):
    """What `KVBlocks` asks of a format."""

    def __init__(self, like: Tensor, num_blocks: int, block_size: int) -> None:
        """Take memory for rows like those of `like` [.., kv_heads, size]."""

    @staticmethod
    def head_bytes(size: int, dtype: torch.dtype) -> int:
        """Bytes of one token and head of `size` values that come in `dtype`."""

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Store rows [T, kv_heads, size] in slots int64[T]; each slot is written whole, and no other changes."""

    def clear(self, blocks: Tensor) -> None:
        """Make all rows of blocks int64[n] zeros."""

    def gather(self, blocks: Tensor) -> Tensor:
        """Copy out blocks int64[n]: [n, block_size, kv_heads, size] in the dtype of the rows that were written."""

    def read(self, first_slot: int, last_slot: int) -> Tensor:
        """Rows of slots `first_slot .. last_slot - 1`: [n, kv_heads, size]; a copy only where it must be."""

    @property
    def stored(self) -> Stored:
        """All blocks, as they are."""


class PlainStore:
    """Rows in the dtype in which they come. A `KVStore`."""

    def __init__(self, like: Tensor, num_blocks: int, block_size: int) -> None:
        self._blocks = like.new_empty((num_blocks, block_size, *like.shape[-2:]))
        self._slots = self._blocks.flatten(0, 1)

    @staticmethod
    def head_bytes(size: int, dtype: torch.dtype) -> int:
        """See `KVStore`."""
        return size * dtype.itemsize

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """See `KVStore`."""
        self._slots.index_copy_(0, slots, rows)

    def clear(self, blocks: Tensor) -> None:
        """See `KVStore`."""
        self._blocks.index_fill_(0, blocks, 0)

    def gather(self, blocks: Tensor) -> Tensor:
        """See `KVStore`."""
        return self._blocks.index_select(0, blocks)

    def read(self, first_slot: int, last_slot: int) -> Tensor:
        """See `KVStore`; never a copy."""
        return self._slots[first_slot:last_slot]

    @property
    def stored(self) -> Stored:
        """See `KVStore`."""
        return Stored(self._blocks)


class Int8Store:
    """Rows as `codes * scales`, one scale for each token and head. A `KVStore`.

    A row of `size` values takes `size + 2` bytes: of the bytes in 16 bit, 0.508 at size 128, 0.516 at
    64, 0.531 at 32 and 0.563 at 16. Written rows are never scaled again, so what a block holds depends
    on its tokens alone.
    """

    def __init__(self, like: Tensor, num_blocks: int, block_size: int) -> None:
        num_heads, size = like.shape[-2:]
        self._dtype = like.dtype
        self._codes = like.new_empty((num_blocks, block_size, num_heads, size), dtype=torch.int8)
        self._scales = like.new_empty((num_blocks, block_size, num_heads, 1), dtype=_SCALE_DTYPE)
        self._slot_codes, self._slot_scales = self._codes.flatten(0, 1), self._scales.flatten(0, 1)

    @staticmethod
    def head_bytes(size: int, dtype: torch.dtype) -> int:
        """See `KVStore`; the same for every dtype."""
        return size + _SCALE_DTYPE.itemsize

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """See `KVStore`."""
        codes, scales = encode(rows)
        self._slot_codes.index_copy_(0, slots, codes)
        self._slot_scales.index_copy_(0, slots, scales)

    def clear(self, blocks: Tensor) -> None:
        """See `KVStore`; whatever the codes are, with scales of zero they are zeros."""
        self._scales.index_fill_(0, blocks, 0)

    def gather(self, blocks: Tensor) -> Tensor:
        """See `KVStore`."""
        return decode(self._codes.index_select(0, blocks), self._scales.index_select(0, blocks), self._dtype)

    def read(self, first_slot: int, last_slot: int) -> Tensor:
        """See `KVStore`; always a copy."""
        codes, scales = (slots[first_slot:last_slot] for slots in (self._slot_codes, self._slot_scales))
        return decode(codes, scales, self._dtype)

    @property
    def stored(self) -> Stored:
        """See `KVStore`."""
        return Stored(self._codes, self._scales)


STORES: Mapping[KVFormat, type[KVStore]] = MappingProxyType({"auto": PlainStore, "int8": Int8Store})
"""The store of each format."""


def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows [.., size] to `codes * scales`, each within half a scale.

    The codes are chosen for the scale as it is stored. Rounding the largest value's 127th part to 8 bits
    moves it by a factor of 1 + 2**-8 at most, so the largest code is 127 without clipping. Where
    decoding could give infinity, above 127 times the largest scale, values are clipped: that is 0.8 % or
    less below the largest number of the dtype. A row with NaN or infinity becomes one without any finite value.

    Returns:
        codes int8[.., size] in -127 .. 127 and scales bfloat16[.., 1], NaN where a row is not finite.
    """
    values = rows.float()
    largest = values.abs().amax(-1, keepdim=True)
    scales = (largest / _LARGEST_CODE).clamp_(_SMALLEST_SCALE, _largest_scale(rows.dtype))
    scales = scales.add_(largest * 0).to(_SCALE_DTYPE)  # 0, or NaN where the row is not finite
    codes = (values / scales).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return codes.to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in `dtype` from what `encode` gave; each product is rounded once."""
    return codes.to(dtype).mul_(scales)


def _largest_scale(dtype: torch.dtype) -> float:
    """The largest scale whose 127-fold is finite in a dtype."""
    mantissa, exponent = math.frexp(torch.finfo(dtype).max / _LARGEST_CODE)
    return math.ldexp(math.floor(math.ldexp(mantissa, _SCALE_BITS)), exponent - _SCALE_BITS)
