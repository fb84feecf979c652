"""Bit layout of packed codes, against a picture drawn by hand and against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.numerics.packing import K_TILE, pack_bits, padded_width, unpack_bits


def test_first_code_is_in_the_low_nibble_and_the_unused_one_is_zero() -> None:
    codes = torch.tensor([[0x1, 0x2, 0xF, 0x0, 0xA], [0x8, 0x7, 0x0, 0xF, 0x3]], dtype=torch.uint8)
    packed = torch.tensor([[0x21, 0x0F, 0x0A], [0x78, 0xF0, 0x03]], dtype=torch.uint8)
    assert torch.equal(pack_bits(codes, 4), packed)


def test_eight_bit_codes_are_their_own_packing() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(pack_bits(codes, 8), codes)
    assert torch.equal(unpack_bits(codes, 8), codes)


@settings(deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 67), seed=st.integers(0, 2**31))
def test_packing_agrees_with_numpy_and_unpacks_to_the_codes(rows: int, width: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (rows, width), dtype=np.uint8)
    padded = np.pad(codes, ((0, 0), (0, width % 2)))
    packed = pack_bits(torch.from_numpy(codes), 4)
    assert np.array_equal(packed.numpy(), padded[:, 0::2] + 16 * padded[:, 1::2])
    assert np.array_equal(unpack_bits(packed, 4).numpy(), padded)


def test_rows_that_are_not_contiguous_pack_like_their_copy() -> None:
    codes = torch.randint(0, 16, (6, 8), dtype=torch.uint8)
    assert torch.equal(pack_bits(codes.t(), 4), pack_bits(codes.t().contiguous(), 4))
    assert torch.equal(pack_bits(codes[:, 1:7], 4), pack_bits(codes[:, 1:7].contiguous(), 4))


@pytest.mark.parametrize("width", [1, 32, 33, 96, 100, 576, 4095])
def test_padded_width_is_the_next_multiple_of_the_tile(width: int) -> None:
    assert padded_width(width) % K_TILE == 0
    assert 0 <= padded_width(width) - width < K_TILE
