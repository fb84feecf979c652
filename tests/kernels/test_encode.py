"""Native encoders against `numerics.encode`, for every instruction set of this machine: the same buffers to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.errors import QuantizationError
from service.kernels import dispatch, native
from service.numerics.encode import EncodedWeight, decode
from service.numerics.encode import encode as encode_in_torch
from service.numerics.schemes import QuantScheme, parse_scheme
from tests.kernels.support import computing_with

LIBRARY = native.load().library
ISAS = [] if LIBRARY is None else [isa for isa in LIBRARY.isas if not LIBRARY.obstacle(isa)]
SCHEMES = [
    *("w8a16", "w8a16-g16", "w8a16-g1024", "w4a16-g16", "w4a16-g64", "w4a16-g1024"),
    *("w4a16-g32-sym", "w4a16-g128-sym", "w4a16-row-sym", "nf4", "fp4"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (16, 15), (15, 16), (17, 17), (33, 33), (5, 96), (3, 100), (20, 576), (2, 4095)]  # (out, in)

U = 2.0**-24  # half a unit in the last place of float32, relative
RUN = 16  # squares that are added up in float32, one after another


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_outliers(*shape: int) -> Tensor:
    weight = random(*shape)
    return torch.where(weight.abs() > 2.3, 50 * weight, weight)


def of_any_magnitude(*shape: int) -> Tensor:
    exponents = torch.arange(shape[0]).remainder(25).sub(12)[:, None]  # of rows, as far as float16 has them
    return random(*shape) * 2.0**exponents


def half_steps(*shape: int) -> Tensor:
    """Multiples of 1/2 up to 7.5, so that many quotients are ties."""
    return torch.randint(-15, 16, shape, generator=torch.Generator().manual_seed(sum(shape))) / 2


CONTENTS: dict[str, Callable[..., Tensor]] = {
    "random": random,
    "outliers": with_outliers,
    "magnitudes": of_any_magnitude,
    "ties": half_steps,
    "positive": lambda *shape: random(*shape).abs() + 1,
    "negative": lambda *shape: -random(*shape).abs() - 1,
    "constant": lambda *shape: torch.full(shape, 0.37),
    "zeros": torch.zeros,
    "negative-zeros": lambda *shape: -torch.zeros(shape),
}
EXTREMES: dict[str, Callable[[torch.dtype], float]] = {  # what random numbers up to about 1 are multiplied with
    "largest": lambda dtype: torch.finfo(dtype).max,
    "smallest-scales": lambda dtype: torch.finfo(dtype).tiny * 64,
    "subnormal": lambda dtype: torch.finfo(dtype).tiny / 4,
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, one after another."""
    name: str = request.param
    with computing_with(name):
        yield name


@pytest.fixture
def number_of_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@cache
def content(name: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    if name in CONTENTS:
        return CONTENTS[name](rows, columns).to(dtype)
    unit = random(rows, columns).clamp(-1, 1).double()
    return (unit * EXTREMES[name](dtype)).to(dtype)


@cache
def expected(scheme: QuantScheme, name: str, dtype: torch.dtype, size: tuple[int, int]) -> EncodedWeight:
    return encode_in_torch(content(name, dtype, *size), scheme)


def assert_same_buffers(found: EncodedWeight, wanted: EncodedWeight, what: object = "") -> None:
    for buffer, reference in zip(found[:3], wanted[:3], strict=True):
        assert (buffer is None) == (reference is None)
        assert buffer is None or reference is None or torch.equal(buffer, reference), what


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", [*CONTENTS, *EXTREMES])
@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_buffers_are_those_of_numerics(scheme_name: str, name: str) -> None:
    scheme = parse_scheme(scheme_name)
    for dtype in DTYPES:
        for size in SIZES:
            found = dispatch.encode(content(name, dtype, *size), scheme)
            assert found.pack_s == 0  # else it was not the native encoder
            assert_same_buffers(found, expected(scheme, name, dtype, size), (dtype, size))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", ["random", "outliers", "magnitudes", "constant", "subnormal", "smallest-scales"])
@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_signal_and_noise_are_the_sums_of_squares(scheme_name: str, name: str) -> None:
    """The encoder does not round a product of code and scale, which moves an error by up to u |w'|."""
    scheme = parse_scheme(scheme_name)
    for dtype in DTYPES:
        for size in SIZES:
            found, weight = dispatch.encode(content(name, dtype, *size), scheme), content(name, dtype, *size).double()
            decoded = decode(*found[:3], scheme=scheme, out_features=size[0], in_features=size[1]).double()
            signal, noise = float(weight.square().sum()), float((decoded - weight).square().sum())
            decoded_signal = float(decoded.square().sum())
            assert found.signal == pytest.approx(signal, rel=RUN * U, abs=0)
            rounding = 4 * U * math.sqrt(noise * decoded_signal) + 4 * U**2 * decoded_signal
            assert found.noise == pytest.approx(noise, rel=2 * RUN * U, abs=rounding), (dtype, size)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme_name", ["w8a16", "w4a16-g64", "nf4"])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 300), gap=st.integers(0, 9), first=st.integers(0, 3))
def test_rows_may_lie_apart_and_anywhere(
    scheme_name: str, dtype: torch.dtype, rows: int, columns: int, gap: int, first: int
) -> None:
    wide = torch.full((rows, first + columns + gap), math.nan, dtype=dtype)
    view = wide[:, first : first + columns]
    view.copy_(random(rows, columns))
    found = dispatch.encode(view, parse_scheme(scheme_name))
    assert found.pack_s == 0
    assert_same_buffers(found, encode_in_torch(view.clone(), parse_scheme(scheme_name)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf], ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("scheme_name", ["w8a16", "w8a16-g64", "w4a16-g64", "w4a16-g64-sym", "nf4", "fp4"])
def test_one_number_that_is_not_finite_is_refused(scheme_name: str, value: float, dtype: torch.dtype) -> None:
    for row, column in ((0, 0), (0, 31), (16, 64), (17, 98), (17, 99)):
        weight = random(18, 100).to(dtype)
        weight[row, column] = value
        with pytest.raises(QuantizationError, match="holds NaN or infinity"):
            dispatch.encode(weight, parse_scheme(scheme_name))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_the_largest_finite_numbers_are_not_refused(scheme_name: str, dtype: torch.dtype) -> None:
    weight = torch.full((17, 33), torch.finfo(dtype).max, dtype=dtype)
    weight[::2] *= -1
    found = dispatch.encode(weight, parse_scheme(scheme_name))
    assert_same_buffers(found, encode_in_torch(weight, parse_scheme(scheme_name)))
    assert found.signal == pytest.approx(weight.numel() * torch.finfo(dtype).max ** 2)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scheme_name", ["w8a16", "w4a16-g64", "nf4"])
def test_threads_change_neither_a_bit_nor_the_sums(scheme_name: str, number_of_threads: Callable[[int], None]) -> None:
    weight = random(700, 1000).bfloat16()
    number_of_threads(1)
    alone = dispatch.encode(weight, parse_scheme(scheme_name))
    for count in (2, 3, 8):
        number_of_threads(count)
        shared = dispatch.encode(weight, parse_scheme(scheme_name))
        assert_same_buffers(shared, alone, count)
        assert (shared.signal, shared.noise) == (alone.signal, alone.noise)


@pytest.mark.parametrize(
    "weight",
    [random(40, 36).t(), random(5, 6, 7)[:, :, 0], random(40, 36).double(), random(9, 1).expand(9, 40)],
    ids=["transposed", "strided-columns", "float64", "repeated-columns"],
)
def test_other_weights_are_encoded_by_numerics(weight: Tensor) -> None:
    found = dispatch.encode(weight, parse_scheme("w4a16-g16"))
    assert found.pack_s > 0
    assert_same_buffers(found, encode_in_torch(weight, parse_scheme("w4a16-g16")))


def test_without_native_kernels_numerics_encodes() -> None:
    with computing_with("torch"):
        assert dispatch.encode(random(40, 36), parse_scheme("w8a16")).pack_s > 0


@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 0)], ids=str)
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizationError, match="cannot be quantized"):
        dispatch.encode(torch.zeros(shape), parse_scheme("w8a16"))
