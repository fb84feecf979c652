"""The torch kernels against a float64 product with the decoded weight."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from service.kernels import reference
from service.numerics.encode import EncodedWeight, decode, encode
from service.numerics.schemes import W8A16, QuantScheme, parse_scheme

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SCHEMES = ["w8a16", "w8a16-g32", "w4a16-g64", "w4a16-g128-sym", "nf4", "fp4"]
MORE_SCHEMES = [
    *("zeropoint", "w8a16-g64-float", "w2a16", "w3a16-row", "w4a16-row-sym", "w5a16-float", "w6a16+mse", "w4a16+hqq"),
    *("nf4-dq", "fp8", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
]
K_QUANTS = ["q4_k", "q5_k", "q6_k"]
SIZES = [(1, 1), (15, 33), (16, 32), (17, 96), (64, 100), (48, 576), (300, 4095)]
# Relative to ||y||. bfloat16 rounds twice by at most 2^-8: sums and results, or weights and results. float16 is
# computed in float32 and rounds the results by 2^-11. float32 sums of up to 4095 products stay below 1e-5.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2 * 2**-8, torch.float16: 2**-11}


class Case(NamedTuple):
    """A weight, its decoded values and its product."""

    encoded: EncodedWeight
    weight: Tensor
    scheme: QuantScheme

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        qweight, scales = self.encoded.qweight.to(x.device), self.encoded.scales.to(x.device)
        out_features = len(self.weight)
        zero_points = None if self.encoded.zero_points is None else self.encoded.zero_points.to(x.device)
        return reference.linear(
            x, qweight, scales, zero_points, scheme=self.scheme, out_features=out_features, bias=bias
        )


def make_case(name: str, out_features: int, in_features: int) -> Case:
    scheme = parse_scheme(name)
    encoded = encode(normal(out_features, in_features).mul_(0.02), scheme)
    weight = decode(*encoded[:3], scheme=scheme, out_features=out_features, in_features=in_features)
    return Case(encoded, weight, scheme)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_product_is_that_of_the_decoded_weight(
    name: str, size: tuple[int, int], rows: int, dtype: torch.dtype, device: str
) -> None:
    case = make_case(name, *size)
    x, bias = normal(rows, size[1]).to(device, dtype), normal(size[0]).to(device, dtype)
    expected = x.cpu().double() @ case.weight.double().t()
    y, y_with_bias = case.linear(x), case.linear(x, bias)
    assert y.dtype == y_with_bias.dtype == dtype
    assert relative_error(y, expected) <= BOUNDS[dtype]
    assert relative_error(y_with_bias, expected + bias.cpu().double()) <= BOUNDS[dtype]


@pytest.mark.parametrize("size", [(17, 100), (300, 4095)], ids=str)
@pytest.mark.parametrize("name", MORE_SCHEMES)
def test_product_of_every_scheme_is_that_of_the_decoded_weight(name: str, size: tuple[int, int]) -> None:
    check_product(make_case(name, *size))


@pytest.mark.parametrize("name", K_QUANTS)
def test_product_of_a_k_quant_is_that_of_the_decoded_weight(name: str) -> None:
    check_product(make_case(name, 300, 768))


def check_product(case: Case) -> None:
    out_features, in_features = case.weight.shape
    for dtype, bound in BOUNDS.items():
        x, bias = normal(3, in_features).to(dtype), normal(out_features).to(dtype)
        expected = x.double() @ case.weight.double().t() + bias.double()
        assert relative_error(case.linear(x, bias), expected) <= bound


@pytest.mark.parametrize("name", SCHEMES)
def test_a_wrong_weight_would_be_noticed(name: str) -> None:
    case = make_case(name, 48, 576)
    x = normal(3, 576)
    case.encoded.scales[1] *= 1.5  # of the second strip, or of the second row
    assert relative_error(case.linear(x), x.double() @ case.weight.double().t()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_nan_in_one_row_stays_there(name: str, dtype: torch.dtype) -> None:
    case = make_case(name, 48, 576)
    x = normal(3, 576).to(dtype)
    clean = case.linear(x)
    x[1, 5] = float("nan")
    y = case.linear(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("name", SCHEMES)
def test_float16_overflows_only_where_the_result_does(name: str, rows: int) -> None:
    case = make_case(name, 48, 576)
    x = torch.full((rows, 576), 1000.0, dtype=torch.float16)  # sums of codes times 1000 pass 65504
    assert case.linear(x).isfinite().all()
    assert relative_error(case.linear(x), x.double() @ case.weight.double().t()) <= BOUNDS[torch.float16]


@pytest.mark.parametrize("rows", [1, 20])
def test_row_scales_are_not_rounded_to_bfloat16(rows: int) -> None:
    scale = 1 + 2**-8 + 2**-12  # bfloat16 would make 1 + 2^-7 of it, one unit in the last place too many
    y = reference.linear(
        torch.eye(rows, 576).bfloat16(),
        torch.ones(3, 18 * 512, dtype=torch.int8),
        torch.full((48,), scale),
        None,
        scheme=W8A16,
        out_features=48,
        bias=torch.full((48,), -1, dtype=torch.bfloat16),
    )
    assert (y == torch.tensor(2**-8 + 2**-12).bfloat16()).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_several_blocks_are_used_and_join_without_a_seam(name: str) -> None:
    block = reference.CPU_BLOCK_BYTES // (4 * 576) // 16 * 16
    case = make_case(name, block + 5, 576)
    x = normal(20, 576)
    expected = x.double() @ case.weight.double().t()
    y = case.linear(x)
    for part in (slice(block), slice(block - 7, block), slice(block, None)):
        assert relative_error(y[:, part], expected[:, part]) <= BOUNDS[torch.float32]
