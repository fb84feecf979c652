"""Encoding in chunks: the same buffers as rounding the whole weight at once, exact shapes, error sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.errors import QuantizationError
from service.numerics.affine import dequantize, quantize
from service.numerics.encode import CHUNK_WEIGHTS, EncodedWeight, decode, encode, storage_shapes
from service.numerics.packing import unpack_bits
from service.numerics.schemes import parse_scheme

SCHEMES = ["w8a16", "w8a16-g128", "w4a16-g64", "w4a16-g128-sym"]


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def same_buffers(left: EncodedWeight, right: EncodedWeight) -> bool:
    if left.zero_points is None or right.zero_points is None:
        return left.zero_points is right.zero_points and all(map(torch.equal, left[:2], right[:2]))
    return all(map(torch.equal, (*left[:2], left.zero_points), (*right[:2], right.zero_points)))


@pytest.mark.parametrize("columns", [1, 96, 100, 576, 4095])
@pytest.mark.parametrize("name", SCHEMES)
def test_buffers_hold_what_quantize_gives(name: str, columns: int) -> None:
    scheme = parse_scheme(name)
    weight = normal(7, columns).bfloat16()
    encoded = encode(weight, scheme)
    codes, scales, zero_points = quantize(weight, scheme)
    stored = encoded.qweight if scheme.bits == 8 else unpack_bits(encoded.qweight, 4)
    assert torch.equal(stored[:, :columns], codes)
    assert not stored[:, columns:].any()
    assert torch.equal(encoded.scales, scales)
    if zero_points is None:
        assert encoded.zero_points is None
    else:
        assert encoded.zero_points is not None
        assert torch.equal(unpack_bits(encoded.zero_points, 4)[:, : zero_points.shape[1]], zero_points)


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), chunk=st.integers(1, 4000))
def test_chunks_do_not_change_a_bit(name: str, rows: int, columns: int, chunk: int) -> None:
    scheme = parse_scheme(name)
    weight = normal(rows, columns)
    chunked = encode(weight, scheme, chunk_weights=chunk)
    whole = encode(weight, scheme)
    assert same_buffers(chunked, whole)
    assert chunked.noise == pytest.approx(whole.noise, rel=1e-5)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("name", SCHEMES)
def test_threads_do_not_change_a_bit(name: str) -> None:
    weight = normal(700, 1000)
    by_four = encode(weight, parse_scheme(name))
    torch.set_num_threads(1)
    assert same_buffers(by_four, encode(weight, parse_scheme(name)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_transposed_view_encodes_like_its_copy(name: str, dtype: torch.dtype) -> None:
    view = normal(100, 36).to(dtype).t()
    assert same_buffers(encode(view, parse_scheme(name)), encode(view.contiguous(), parse_scheme(name)))


@pytest.mark.parametrize("columns", [1, 100, 576])
@pytest.mark.parametrize("name", SCHEMES)
def test_decode_gives_the_weights_that_quantize_meant(name: str, columns: int) -> None:
    scheme = parse_scheme(name)
    weight = normal(5, columns)
    encoded = encode(weight, scheme)
    expected = dequantize(*quantize(weight, scheme), scheme.group_size)
    assert torch.equal(decode(*encoded[:3], scheme=scheme, in_features=columns), expected)
    rows = torch.tensor([4, 0, 4])
    zero_points = None if encoded.zero_points is None else encoded.zero_points[rows]
    some = decode(encoded.qweight[rows], encoded.scales[rows], zero_points, scheme=scheme, in_features=columns)
    assert torch.equal(some, expected[rows])


@pytest.mark.parametrize("columns", [1, 96, 100, 576, 4095])
@pytest.mark.parametrize("name", SCHEMES)
def test_planned_shapes_and_bytes_are_those_of_the_buffers(name: str, columns: int) -> None:
    scheme = parse_scheme(name)
    shapes = storage_shapes(7, columns, scheme)
    encoded = encode(normal(7, columns), scheme)
    for planned, buffer in zip(shapes, encoded[:3], strict=True):
        assert (planned is None) == (buffer is None)
        assert planned is None or buffer is None or (tuple(buffer.shape), buffer.dtype) == planned
    assert shapes.codes_bytes == encoded.qweight.nbytes
    assert shapes.scales_bytes == encoded.scales.nbytes + (
        0 if encoded.zero_points is None else encoded.zero_points.nbytes
    )


def test_bytes_of_a_real_matrix_equal_a_hand_count() -> None:
    row, group = storage_shapes(1536, 576, parse_scheme("w8a16")), storage_shapes(1536, 576, parse_scheme("w4a16-g64"))
    assert (row.codes_bytes, row.scales_bytes) == (1536 * 576, 1536 * 4)
    assert (group.codes_bytes, group.scales_bytes) == (1536 * 288, 1536 * (9 * 2 + 5))


@pytest.mark.parametrize("magnitude", [1, 1e-25, 1e25])
@pytest.mark.parametrize("name", SCHEMES)
def test_signal_and_noise_are_the_sums_of_squares(name: str, magnitude: float) -> None:
    scheme = parse_scheme(name)
    weight = normal(64, 300).mul(magnitude)
    encoded = encode(weight, scheme)
    error = decode(*encoded[:3], scheme=scheme, in_features=300).double() - weight.double()
    assert encoded.signal == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert encoded.noise == pytest.approx(float(error.square().sum()), rel=1e-5)


def test_zero_weight_has_no_signal_and_no_noise() -> None:
    encoded = encode(torch.zeros(4, 100), parse_scheme("w4a16"))
    assert (encoded.signal, encoded.noise) == (0, 0)


def test_nan_in_the_last_chunk_is_refused() -> None:
    weight = normal(3, CHUNK_WEIGHTS // 2)
    weight[2, -1] = float("nan")
    with pytest.raises(QuantizationError, match="holds NaN or infinity"):
        encode(weight, parse_scheme("w8a16"))


def test_a_vector_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"shape \[4\] cannot be quantized"):
        encode(torch.zeros(4), parse_scheme("w8a16"))
