"""Rounding keys and values to int8: bounds from arithmetic, and rows that no arithmetic helps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from service.engine.config import KVFormat
from service.engine.kv_stores import STORES, Int8Store, PlainStore, decode, encode

SCALE_ROUNDING = 2.0**-8
"""Of bfloat16, relative."""
FLOAT32_ROUNDING = 127 * 2.0**-23
"""Of a quotient of up to 127, in scales; twice what one rounding takes."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make_rows(dtype: torch.dtype) -> Tensor:
    """Rows [4096, 2, 64], each of a spread of its own, all well inside the dtype."""
    generator = torch.Generator().manual_seed(0)
    spreads = torch.exp2(torch.rand((4096, 2, 1), generator=generator) * 16 - 8)
    return (torch.randn((4096, 2, 64), generator=generator) * spreads).to(dtype)


def error_in_bounds(rows: Tensor, codes: Tensor, scales: Tensor) -> float:
    """The largest error of `codes * scales` before it is rounded to a dtype, in the bounds that it must keep."""
    errors = (rows.double() - codes.double() * scales.double()).abs()
    largest = rows.double().abs().amax(-1, keepdim=True)
    bounds = (0.5 + FLOAT32_ROUNDING) * largest / 127 * (1 + SCALE_ROUNDING)
    return float((errors / bounds).max())


@DTYPES
def test_values_are_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    rows = make_rows(dtype)
    codes, scales = encode(rows)
    assert 0.9 < error_in_bounds(rows, codes, scales) <= 1
    assert codes.abs().amax(-1).eq(127).all()  # no row wastes range, none is clipped
    rounded = decode(codes, scales, dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, (codes.float() * scales.float()).to(dtype))


def test_codes_for_the_scale_before_its_rounding_would_be_further_off() -> None:
    rows = make_rows(torch.float32)
    codes, scales = encode(rows)
    exact = rows.abs().amax(-1, keepdim=True) / 127
    assert error_in_bounds(rows, (rows / exact).round(), scales) > 1.3
    assert error_in_bounds(rows, (rows / scales / 2).round() * 2, scales) > 1.9  # one bit less
    assert error_in_bounds(rows, codes, scales * (1 + 2 * SCALE_ROUNDING)) > 1.9


@DTYPES
def test_rows_of_zeros_and_of_the_smallest_numbers_stay_what_they_are_nearly(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for value in (0.0, info.smallest_normal * info.eps, info.smallest_normal, 300 * info.smallest_normal):
        rows = torch.tensor([[0.0, value, -value, value / 2]], dtype=dtype)
        rounded = decode(*encode(rows), dtype)
        step = max(value / 127 * (1 + SCALE_ROUNDING), torch.finfo(torch.bfloat16).smallest_normal)
        error = (rounded.double() - rows.double()).abs().max()
        assert error <= step / 2 + info.smallest_normal * info.eps
        assert rounded[0, 0] == 0


@DTYPES
def test_the_largest_numbers_stay_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.tensor([[largest, -largest, 0.0, largest / 2]], dtype=dtype)
    rounded = decode(*encode(rows), dtype)
    assert rounded.isfinite().all()
    torch.testing.assert_close(rounded, rows, rtol=0.008, atol=0)


@DTYPES
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_so_and_no_other_becomes_so(dtype: torch.dtype, fault: float) -> None:
    rows = make_rows(dtype)[:8]
    expected = decode(*encode(rows), dtype)
    rows[3, 1, 17] = fault
    rounded = decode(*encode(rows), dtype)
    assert not rounded[3, 1].isfinite().any()
    rounded[3, 1] = expected[3, 1]
    assert torch.equal(rounded, expected)


@pytest.mark.parametrize("kv_format", STORES)
def test_a_write_changes_its_own_slots_only(kv_format: KVFormat) -> None:
    rows = make_rows(torch.bfloat16)
    store = STORES[kv_format](rows, 4, 16)
    store.write(torch.arange(64), rows[:64])
    before = store.read(0, 64).clone()
    slots = torch.tensor([63, 5, 40])
    store.write(slots, rows[64:67] * 100)  # larger by far: what is there already keeps its scales
    after = store.read(0, 64)
    assert torch.equal(after[slots], _stored(kv_format, rows[64:67] * 100))
    after = after.index_copy(0, slots, before[slots])
    assert torch.equal(after, before)
    assert torch.equal(before, _stored(kv_format, rows[:64]))


@pytest.mark.parametrize("kv_format", STORES)
def test_blocks_are_gathered_as_they_are_read(kv_format: KVFormat) -> None:
    rows = make_rows(torch.bfloat16)[:64]
    store = STORES[kv_format](rows, 4, 16)
    store.write(torch.arange(64), rows)
    blocks = store.gather(torch.tensor([2, 0, 2]))
    assert (blocks.shape, blocks.dtype) == ((3, 16, 2, 64), torch.bfloat16)
    assert torch.equal(blocks[0], store.read(32, 48))
    assert torch.equal(blocks[1], store.read(0, 16))
    assert torch.equal(blocks[2], blocks[0])


@pytest.mark.parametrize("kv_format", STORES)
def test_a_cleared_block_is_zeros_whatever_was_there(kv_format: KVFormat) -> None:
    rows = torch.full((64, 2, 64), torch.nan, dtype=torch.bfloat16)
    store = STORES[kv_format](rows, 4, 16)
    store.write(torch.arange(64), rows)
    store.clear(torch.tensor([3, 1]))
    read = store.read(0, 64).view(4, -1)
    assert read[1].eq(0).all()
    assert read[3].eq(0).all()
    assert read[0].isnan().all()
    assert read[2].isnan().all()


@pytest.mark.parametrize(
    ("size", "ratio"), [(256, 0.504), (128, 0.508), (64, 0.516), (32, 0.531), (16, 0.563)], ids=str
)
def test_a_head_in_int8_takes_this_share_of_16_bit(size: int, ratio: float) -> None:
    share = Int8Store.head_bytes(size, torch.bfloat16) / PlainStore.head_bytes(size, torch.bfloat16)
    assert share == pytest.approx(ratio, abs=0.0005)
    assert (share <= 0.53) == (size >= 64)
    assert Int8Store.head_bytes(size, torch.float32) == Int8Store.head_bytes(size, torch.float16) == size + 2


def _stored(kv_format: KVFormat, rows: Tensor) -> Tensor:
    return decode(*encode(rows), rows.dtype) if kv_format == "int8" else rows
