"""Native products against float64, for every instruction set of this machine, with bounds from the arithmetic.

Of one output y = sum_k x_k w_k + bias, w_k = (l_k - z) s, x in bfloat16 (u = 2^-24, v = 2^-8: half a unit in the last
place of float32 and of bfloat16, relative):

    products        of two bfloat16 are exact in float32; of float32 activations, off by u |x_k l_k|
    sums            of K of them, in any order, are off by at most K u sum |x_k l_k|; the zero points' share
                    z sum x_k likewise, and the 3 roundings of each of G groups (offset, scale, addition) by 3 u
    levels          of nf4 and fp4 are rounded to bfloat16 by AVX-512 and AMX: v |w_k|
    panels          of these two, of more than 16 rows, hold weights of groups that are rounded once more: v |w_k|
    flushes         pairs of products below 2^-126 count as 0: K 2^-126
    result          rounded to bfloat16: v |y|

With float32 activations nothing is rounded to bfloat16: v = u.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels import dispatch, native
from service.numerics.encode import EncodedWeight, decode, encode
from service.numerics.schemes import QuantScheme, parse_scheme
from tests.kernels.support import computing_with

U, V = 2.0**-24, 2.0**-8
LIBRARY = native.load().library
ISAS = [] if LIBRARY is None else [isa for isa in LIBRARY.isas if not LIBRARY.obstacle(isa)]
SCHEMES = ["w8a16", "w8a16-g16", "w8a16-g128", "w4a16-g64", "w4a16-g32-sym", "w4a16-g1024", "nf4", "fp4"]
SIZES = [(1, 1), (15, 33), (16, 32), (17, 96), (48, 100), (576, 576), (33, 4095)]  # (out, in)
FEW_ROWS = 16  # of AVX-512; AMX has a panel from 65 rows on
ROWS = [1, 2, 3, 4, 5, 8, 13, 16, 17, 33, 70, 130]  # of every loop: few, some, panels whole and in part


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, one after another."""
    name: str = request.param
    with computing_with(name):
        yield name


@dataclass(frozen=True)
class Case:
    """A weight and what a product with it may be off by."""

    scheme: QuantScheme
    out_features: int
    in_features: int
    encoded: EncodedWeight

    @classmethod
    def make(cls, name: str, out_features: int, in_features: int, *, scale: float = 0.02) -> Case:
        scheme = parse_scheme(name)
        weight = normal(out_features, in_features) * scale
        return cls(scheme, out_features, in_features, encode(weight, scheme))

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return dispatch.linear(x, *self.encoded[:3], scheme=self.scheme, out_features=self.out_features, bias=bias)

    def weights(self) -> Tensor:
        qweight, scales, zero_points = self.encoded[:3]
        weights = decode(
            qweight,
            scales,
            zero_points,
            scheme=self.scheme,
            out_features=self.out_features,
            in_features=self.in_features,
        )
        return weights.double()

    def spans(self) -> Tensor:
        """(|l_k| + z) s, at most 15 + 15 steps for integers with zero points; |w_k| where there are none."""
        if self.encoded.zero_points is None:
            return self.weights().abs()
        scales = self.encoded.scales.double().permute(0, 2, 1).reshape(-1, self.encoded.scales.shape[1])
        group = torch.arange(self.in_features) // self.scheme.group_size
        return 30 * scales[: self.out_features, group]

    def bound(self, x: Tensor, expected: Tensor) -> Tensor:
        magnitude = x.double().abs()
        v = V if x.dtype == torch.bfloat16 else U
        groups = 1 if not self.scheme.group_size else -(-self.in_features // self.scheme.group_size)
        sums = (self.in_features + 3 * groups + 2) * U * (magnitude @ self.spans().T)
        pairs = dispatch.kernel_name("cpu", x.dtype) in ("native-avx512", "native-amx")  # else nothing is rounded
        is_panel = len(x) > FEW_ROWS and bool(self.scheme.group_size)
        num_rounded = pairs * (bool(self.scheme.codebook) + is_panel) if x.dtype == torch.bfloat16 else 2
        rounded = num_rounded * v * (magnitude @ self.weights().abs().T)
        inner = sums + rounded + self.in_features * 2.0**-126
        return inner + v * (expected.abs() + inner)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def excess(case: Case, x: Tensor, bias: Tensor | None = None) -> float:
    """The largest error in units of its bound."""
    expected = x.double() @ case.weights().T + (0 if bias is None else bias.double())
    error = (case.multiply(x, bias).double() - expected).abs()
    return float((error / case.bound(x, expected).clamp(min=1e-300)).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_within_the_bound_of_their_arithmetic(
    isa: str, name: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    case = Case.make(name, *size)
    worst = {rows: excess(case, normal(rows, size[1]).to(dtype)) for rows in ROWS}
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 16, 130])
@pytest.mark.parametrize("name", ["w8a16", "w4a16-g64", "nf4"])
def test_the_bound_notices_a_single_wrong_code(isa: str, name: str, rows: int, dtype: torch.dtype) -> None:
    case, x = Case.make(name, 48, 96), normal(rows, 96).to(dtype)
    assert excess(case, x) <= 1
    expected = x.double() @ case.weights().T
    case.encoded.qweight.view(torch.uint8)[0, 7] ^= 8
    error = (case.multiply(x).double() - expected).abs()
    assert float((error / case.bound(x, expected)).max()) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("name", ["w8a16", "w4a16-g64"])
def test_a_bias_is_added_before_the_result_is_rounded(isa: str, name: str, rows: int, dtype: torch.dtype) -> None:
    bias = normal(50).to(dtype)
    assert excess(Case.make(name, 50, 100), normal(rows, 100).to(dtype), bias) <= 1


@pytest.mark.parametrize("rows", [1, 3, 5, 17, 40])
def test_rows_that_lie_apart_or_at_odd_addresses_give_the_same(isa: str, rows: int) -> None:
    case, x = Case.make("w4a16-g64", 33, 96), normal(rows, 96).bfloat16()
    apart = torch.full((rows, 130), torch.nan, dtype=torch.bfloat16)
    apart[:, 5:101] = x
    assert torch.equal(case.multiply(apart[:, 5:101]), case.multiply(x))


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("name", ["w8a16", "w4a16-g64", "nf4"])
def test_weights_and_activations_at_the_ends_of_the_range_stay_in_the_bound(isa: str, name: str, rows: int) -> None:
    """Scales as small and as large as bfloat16 holds, and activations that keep the products finite."""
    for weights, activations in ((1e-36, 1e3), (1e30, 1e-2), (1.0, 1e-30)):
        case = Case.make(name, 17, 96, scale=weights)
        assert excess(case, (normal(rows, 96) * activations).bfloat16()) <= 1


@pytest.mark.parametrize("rows", [1, 4, 16, 40])
@pytest.mark.parametrize("name", ["w8a16", "w4a16-g64"])
def test_nan_and_infinity_stay_in_their_row(isa: str, name: str, rows: int) -> None:
    case, x = Case.make(name, 48, 96), normal(rows, 96).bfloat16()
    clean = case.multiply(x)
    x[0, 3], x[0, 7] = torch.nan, torch.inf
    spoilt = case.multiply(x)
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1:], clean[1:])


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 31), (17, 100), (64, 576), (5, 4095)], ids=str)
def test_unquantized_products_are_within_the_bound_of_their_sums(isa: str, size: tuple[int, int], rows: int) -> None:
    weight, x, bias = normal(*size).bfloat16(), normal(rows, size[1]).bfloat16(), normal(size[0]).bfloat16()
    expected = x.double() @ weight.double().T + bias.double()
    inner = (size[1] + 2) * U * (x.double().abs() @ weight.double().abs().T) + size[1] * 2.0**-126
    error = (dispatch.linear_unquantized(x, weight, bias).double() - expected).abs()
    assert (error <= inner + V * (expected.abs() + inner)).all()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(SCHEMES),
    size=st.tuples(st.integers(1, 70), st.integers(1, 200)),
    rows=st.integers(1, 40),
    offset=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_size_alignment_and_number_of_rows_is_within_the_bound(
    name: str, size: tuple[int, int], rows: int, offset: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scheme = parse_scheme(name)
    case = Case(scheme, *size, encode(torch.randn(size, generator=generator), scheme))
    x = torch.randn(rows, size[1] + offset, generator=generator).bfloat16()[:, offset:]
    assert excess(case, x) <= 1
