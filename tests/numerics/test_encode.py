"""Encoding in chunks: the same buffers as rounding the whole weight at once, exact shapes, error sums."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.errors import QuantizationError
from service.numerics.affine import QuantizedWeight
from service.numerics.encode import CHUNK_WEIGHTS, EncodedWeight, decode, decode_rows, encode
from service.numerics.rounding import round_rows, weights_of
from service.numerics.schemes import QuantScheme, parse_scheme
from service.numerics.storage import storage_shapes
from tests.numerics.tiles import codes_of, group_values_of, padding_of, zero_points_of

SCHEMES = ["w8a16", "w8a16-g128", "w4a16-g64", "w4a16-g128-sym", "nf4", "fp4"]
WHOLE = ["absmax", "zeropoint", "nf4-dq"]  # look at the whole tensor
K_QUANTS = ["q4_k", "q5_k", "q6_k"]
MORE_SCHEMES = [
    *("w8a16-asym", "w2a16", "w3a16-row", "w5a16-g32", "w6a16-sym", "w4a16-float", "w8a16-row-float", "w4a16-row-sym"),
    *("w4a16+mse", "w3a16-asym+mse", "w5a16-row-sym+mse", "w4a16+hqq", "fp8", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
]
SIZES = [(1, 1), (15, 33), (16, 32), (17, 96), (33, 100), (7, 576), (40, 15), (18, 4095)]


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


def rounded(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    return round_rows(weight.float(), scheme)


def meant(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """The weights that rounding stands for."""
    return weights_of(rounded(weight, scheme), scheme)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [*SCHEMES, *MORE_SCHEMES])
def test_buffers_hold_what_rounding_gives_and_padding_that_changes_nothing(name: str, size: tuple[int, int]) -> None:
    scheme = parse_scheme(name)
    weight = normal(*size).bfloat16()
    qweight, scales, zero_points = encode(weight, scheme)[:3]
    expected = rounded(weight, scheme)
    assert np.array_equal(codes_of(qweight, *size, bits=scheme.bits), expected.codes.numpy())
    assert not padding_of(qweight, *size, bits=scheme.bits).any()
    stored_scales = group_values_of(scales, 16 * len(qweight))
    assert np.array_equal(stored_scales[: size[0]], expected.scales.float().view(size[0], -1).numpy())
    assert (stored_scales[size[0] :] == 1).all()
    assert (zero_points is None) == (expected.zero_points is None)
    if zero_points is not None and expected.zero_points is not None:
        stored_points = zero_points_of(zero_points, 16 * len(qweight))
        assert np.array_equal(stored_points[: size[0]], expected.zero_points.numpy())
        assert not stored_points[size[0] :].any()


@pytest.mark.parametrize("name", [*SCHEMES, *MORE_SCHEMES])
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), chunk=st.integers(1, 12000))
def test_chunks_do_not_change_a_bit(name: str, rows: int, columns: int, chunk: int) -> None:
    scheme = parse_scheme(name)
    weight = normal(rows, columns)
    chunked = encode(weight, scheme, chunk_weights=chunk)
    whole = encode(weight, scheme)
    assert same_buffers(chunked, whole)
    assert chunked.noise == pytest.approx(whole.noise, rel=1e-5)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("rows", [700, 100], ids=["a chunk for each thread", "one chunk"])
@pytest.mark.parametrize("name", [*SCHEMES, *MORE_SCHEMES, *WHOLE, *K_QUANTS])
def test_threads_change_neither_a_bit_nor_the_sums(name: str, rows: int) -> None:
    weight = normal(rows, 1024)
    by_four = encode(weight, parse_scheme(name))
    torch.set_num_threads(1)
    by_one = encode(weight, parse_scheme(name))
    assert same_buffers(by_four, by_one)
    assert (by_four.signal, by_four.noise) == (by_one.signal, by_one.noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_transposed_view_encodes_like_its_copy(name: str, dtype: torch.dtype) -> None:
    view = normal(100, 36).to(dtype).t()
    assert same_buffers(encode(view, parse_scheme(name)), encode(view.contiguous(), parse_scheme(name)))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [*SCHEMES, *MORE_SCHEMES])
def test_decode_gives_the_weights_that_rounding_meant(name: str, size: tuple[int, int]) -> None:
    scheme = parse_scheme(name)
    weight = normal(*size)
    encoded, expected = encode(weight, scheme), meant(weight, scheme)
    assert torch.equal(decode(*encoded[:3], scheme=scheme, out_features=size[0], in_features=size[1]), expected)
    rows = torch.tensor([size[0] - 1, 0, size[0] // 2, 0])
    assert torch.equal(decode_rows(*encoded[:3], rows, scheme=scheme, in_features=size[1]), expected[rows])
    assert decode_rows(*encoded[:3], rows[:0], scheme=scheme, in_features=size[1]).shape == (0, size[1])


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "w8a16"])
def test_a_run_of_strips_decodes_by_itself(name: str) -> None:
    scheme = parse_scheme(name)
    weight = normal(50, 100)
    qweight, scales, zero_points = encode(weight, scheme)[:3]
    run = decode(
        qweight[1:3],
        scales[1:3],
        None if zero_points is None else zero_points[1:3],
        scheme=scheme,
        out_features=20,
        in_features=100,
    )
    assert torch.equal(run, meant(weight, scheme)[16:36])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [*SCHEMES, *MORE_SCHEMES, *WHOLE])
def test_planned_shapes_and_bytes_are_those_of_the_buffers(name: str, size: tuple[int, int]) -> None:
    scheme = parse_scheme(name)
    shapes = storage_shapes(*size, scheme)
    encoded = encode(normal(*size), scheme)
    for planned, buffer in zip(shapes, encoded[:3], strict=True):
        assert (planned is None) == (buffer is None)
        assert planned is None or buffer is None or (tuple(buffer.shape), buffer.dtype) == planned
    assert shapes.codes_bytes == encoded.qweight.nbytes
    assert shapes.scales_bytes == encoded.scales.nbytes + (
        0 if encoded.zero_points is None else encoded.zero_points.nbytes
    )


@pytest.mark.parametrize(
    ("name", "codes_bytes", "scales_bytes"),
    [
        ("w8a16", 1536 * 576, 1536 * 4),
        ("w8a16-g64", 1536 * 576, 1536 * 9 * 2),
        ("w4a16-g64", 1536 * 288, 1536 * 9 * 2 + 1536 * 9 // 2),
        ("w4a16-g64-sym", 1536 * 288, 1536 * 9 * 2),
        ("nf4", 1536 * 288, 1536 * 9 * 4),
        ("nf4-dq", 1536 * 288, 96 * 16 * (9 + 1)),  # the mean and one peak fit into 16 bytes
        ("w2a16", 1536 * 144, 1536 * 9 * 2 + 1536 * 9 // 2),
        ("w3a16-sym", 1536 * 216, 1536 * 9 * 2),
        ("w5a16", 1536 * 360, 1536 * 9 * 3),
        ("w6a16-float", 1536 * 432, 1536 * 9 * 4),
        ("w6a16-row", 1536 * 432, 1536 * 5),
        ("absmax", 1536 * 576, 1536 * 4),
        ("fp8", 1536 * 576, 1536 * 4),
        ("q8_0", 1536 * 576, 1536 * 18 * 2),
        ("q4_0", 1536 * 288, 1536 * 18 * 2),
        ("q4_1", 1536 * 288, 1536 * 18 * 4),
        ("q5_1", 1536 * 360, 1536 * 18 * 4),
    ],
)
def test_bytes_of_a_real_matrix_equal_a_hand_count(name: str, codes_bytes: int, scales_bytes: int) -> None:
    shapes = storage_shapes(1536, 576, parse_scheme(name))
    assert (shapes.codes_bytes, shapes.scales_bytes) == (codes_bytes, scales_bytes)


@pytest.mark.parametrize(("name", "bits"), [("q4_k", 4.5), ("q5_k", 5.5), ("q6_k", 6.5625), ("q8_0", 8.5)])
def test_formats_of_gguf_take_the_bits_that_they_take_there(name: str, bits: float) -> None:
    shapes = storage_shapes(1536, 768, parse_scheme(name))
    assert 8 * (shapes.codes_bytes + shapes.scales_bytes) == bits * 1536 * 768


def test_bytes_of_an_odd_matrix_include_its_padding() -> None:
    shapes = storage_shapes(17, 33, parse_scheme("w4a16-g32"))
    assert (shapes.codes_bytes, shapes.scales_bytes) == (32 * 64 // 2, 32 * 2 * 2 + 32 * 2 // 2)


@pytest.mark.parametrize("magnitude", [1, 1e-25, 1e25])
@pytest.mark.parametrize("name", SCHEMES)
def test_signal_and_noise_are_the_sums_of_squares(name: str, magnitude: float) -> None:
    scheme = parse_scheme(name)
    weight = normal(64, 300).mul(magnitude)
    encoded = encode(weight, scheme)
    error = decode(*encoded[:3], scheme=scheme, out_features=64, in_features=300).double() - weight.double()
    assert encoded.signal == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert encoded.noise == pytest.approx(float(error.square().sum()), rel=1e-5)


@pytest.mark.parametrize("name", [*SCHEMES, *MORE_SCHEMES, *WHOLE])
def test_zero_weight_has_no_signal_and_no_noise(name: str) -> None:
    encoded = encode(torch.zeros(4, 100), parse_scheme(name))
    assert (encoded.signal, encoded.noise) == (0, 0)


@pytest.mark.parametrize("name", [*SCHEMES, *MORE_SCHEMES, *WHOLE, *K_QUANTS])
def test_nan_in_the_last_chunk_is_refused(name: str) -> None:
    weight = normal(3, CHUNK_WEIGHTS // 2)
    weight[2, -1] = float("nan")
    with pytest.raises(QuantizationError, match="holds NaN or infinity"):
        encode(weight, parse_scheme(name))


def test_a_vector_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"shape \[4\] cannot be quantized"):
        encode(torch.zeros(4), parse_scheme("w8a16"))
