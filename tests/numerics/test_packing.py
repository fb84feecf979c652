"""Strips and tiles: against the drawing, element by element, and round trips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.numerics.packing import (
    K_TILE,
    STRIP,
    from_strips,
    num_strips,
    num_tiles,
    pack_nibbles,
    pack_tiles,
    to_strips,
    unpack_nibbles,
    unpack_rows,
    unpack_tiles,
)
from tests.numerics.tiles import codes_of

BITS = [8, 2, 3, 4, 5, 6]


def make_codes(strips: int, tiles: int, bits: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (strips * STRIP, tiles * K_TILE)
    if bits == 8:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("size", "strips", "tiles"), [(1, 1, 1), (16, 1, 1), (17, 2, 1), (33, 3, 2), (4095, 256, 128)])
def test_sizes_are_padded_to_the_next_strip_and_tile(size: int, strips: int, tiles: int) -> None:
    assert (num_strips(size), num_tiles(size)) == (strips, tiles)


def test_first_bytes_of_an_8_bit_tile_are_four_outputs_of_two_columns_twice() -> None:
    codes = torch.zeros(16, 32, dtype=torch.int8)
    codes[:4, :4] = torch.arange(1, 17).view(4, 4)  # outputs 0 to 3, columns 0 to 3
    packed = pack_tiles(codes, 8)
    assert packed[0, :16].tolist() == [1, 2, 5, 6, 9, 10, 13, 14, 3, 4, 7, 8, 11, 12, 15, 16]
    assert not packed[0, 16:].any()


def test_first_word_of_a_4_bit_tile_is_eight_columns_of_output_0() -> None:
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[0, :8] = torch.arange(1, 9)
    codes[1, 0] = 15
    packed = pack_tiles(codes, 4)
    assert packed[0, :5].tolist() == [0x31, 0x75, 0x42, 0x86, 0x0F]
    assert not packed[0, 5:].any()


@pytest.mark.parametrize(("strips", "tiles"), [(1, 1), (1, 3), (3, 1), (2, 4), (3, 18)])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_lies_where_the_drawing_says(bits: int, strips: int, tiles: int) -> None:
    codes = make_codes(strips, tiles, bits)
    packed = pack_tiles(codes, bits)
    assert (packed.shape, packed.dtype) == ((strips, tiles * 64 * bits), codes.dtype)
    assert np.array_equal(codes_of(packed, *codes.shape, bits=bits), codes.numpy())


@pytest.mark.parametrize("bits", BITS)
@settings(deadline=None, max_examples=30)
@given(strips=st.integers(1, 5), tiles=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_unpacking_gives_the_codes_back_whole_and_row_by_row(bits: int, strips: int, tiles: int, seed: int) -> None:
    codes = make_codes(strips, tiles, bits, seed=seed)
    packed = pack_tiles(codes, bits)
    assert torch.equal(unpack_tiles(packed, bits), codes)
    assert torch.equal(unpack_tiles(packed[strips // 2 :], bits), codes[strips // 2 * STRIP :])
    rows = torch.randint(0, len(codes), (7,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_rows(packed, rows, bits), codes[rows])
    assert unpack_rows(packed, rows[:0], bits).shape == (0, codes.shape[1])


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_are_not_contiguous_pack_like_their_copy(bits: int) -> None:
    codes = make_codes(2, 1, bits).t()
    assert torch.equal(pack_tiles(codes, bits), pack_tiles(codes.contiguous(), bits))


def test_values_of_groups_lie_side_by_side_by_strip() -> None:
    values = torch.arange(32 * 3).view(32, 3)
    strips = to_strips(values)
    assert strips.shape == (2, 3, 16)
    assert strips[1, 2].tolist() == [3 * output + 2 for output in range(16, 32)]
    assert torch.equal(from_strips(strips), values)


@settings(deadline=None)
@given(rows=st.integers(1, 5), pairs=st.integers(1, 33), seed=st.integers(0, 2**31))
def test_nibbles_agree_with_numpy_and_unpack_to_the_codes(rows: int, pairs: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (rows, 2 * pairs), dtype=np.uint8)
    packed = pack_nibbles(torch.from_numpy(codes))
    assert np.array_equal(packed.numpy(), codes[:, 0::2] + 16 * codes[:, 1::2])
    assert np.array_equal(unpack_nibbles(packed).numpy(), codes)
