"""Every regime of the torch kernels against a float64 product with the decoded weight."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from service.kernels import dispatch, reference
from service.numerics.encode import EncodedWeight, decode, encode
from service.numerics.schemes import QuantScheme, parse_scheme

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SCHEMES = ["w8a16", "w8a16-g32", "w4a16-g64", "w4a16-g128-sym"]
# Relative to ||y||. bfloat16 rounds twice by at most 2^-8: sums and results, or weights and results. float16 is
# computed in float32 and rounds the results by 2^-11. float32 sums of up to 4095 products stay below 1e-5.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2 * 2**-8, torch.float16: 2**-11}


class Case(NamedTuple):
    """A weight, its decoded values and a product with the kernel that `dispatch` picks."""

    encoded: EncodedWeight
    weight: Tensor
    scheme: QuantScheme

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        buffers = [None if buffer is None else buffer.to(x.device) for buffer in self.encoded[:3]]
        qweight, scales, zero_points = buffers
        assert qweight is not None
        assert scales is not None
        return dispatch.linear(x, qweight, scales, zero_points, scheme=self.scheme, bias=bias)


def make_case(name: str, out_features: int, in_features: int) -> Case:
    scheme = parse_scheme(name)
    encoded = encode(normal(out_features, in_features).mul_(0.02), scheme)
    return Case(encoded, decode(*encoded[:3], scheme=scheme, in_features=in_features), scheme)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("rows", [1, dispatch.FEW_ROWS, dispatch.FEW_ROWS + 1, 33])
@pytest.mark.parametrize("size", [(33, 96), (64, 100), (48, 576), (300, 4095)], ids=str)
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


@pytest.mark.parametrize("name", SCHEMES)
def test_a_wrong_weight_would_be_noticed(name: str) -> None:
    case = make_case(name, 48, 576)
    x = normal(3, 576)
    case.encoded.scales[7] *= 1.5
    assert relative_error(case.linear(x), x.double() @ case.weight.double().t()) > 1e-2


@pytest.mark.parametrize("shape", [(576,), (0, 576), (1, 5, 576), (2, 1, 3, 576)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_leading_dimensions_are_kept(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    case = make_case(name, 48, 576)
    x = normal(*shape).to(dtype)
    y = case.linear(x)
    assert y.shape == (*shape[:-1], 48)
    assert torch.allclose(y.double(), x.double() @ case.weight.double().t(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("name", SCHEMES)
def test_strided_activations_give_the_same_as_their_copy(name: str, rows: int) -> None:
    case = make_case(name, 48, 576)
    x = normal(576, rows).bfloat16().t()
    assert torch.equal(case.linear(x), case.linear(x.contiguous()))


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_nan_in_one_row_stays_there(name: str, dtype: torch.dtype, rows: int) -> None:
    case = make_case(name, 48, 576)
    x = normal(rows, 576).to(dtype)
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
    x = torch.eye(rows, 576).bfloat16()
    y = dispatch.linear(
        x,
        torch.ones(48, 576, dtype=torch.int8),
        torch.full((48,), scale),
        None,
        scheme=parse_scheme("w8a16"),
        bias=torch.full((48,), -1, dtype=torch.bfloat16),
    )
    assert (y == torch.tensor(2**-8 + 2**-12).bfloat16()).all()


@pytest.mark.parametrize("in_features", [32, 96, 160, 544])
@pytest.mark.parametrize("rows", range(1, dispatch.FEW_ROWS + 1))
def test_int8_operator_reads_no_further_than_its_operands(rows: int, in_features: int) -> None:
    surroundings = torch.full((rows + 2, in_features), float("nan"), dtype=torch.bfloat16)
    surroundings[1:-1] = normal(rows, in_features)
    codes = torch.randint(-127, 128, (13, in_features), dtype=torch.int8)
    y = reference.linear_w8a16_few_rows(surroundings[1:-1], codes, torch.ones(13), None)
    expected = surroundings[1:-1].double() @ codes.double().t()
    assert relative_error(y, expected) <= BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("name", SCHEMES)
def test_several_blocks_are_used_and_join_without_a_seam(name: str) -> None:
    out_features = reference.CPU_BLOCK_BYTES // (4 * 576) + 5
    case = make_case(name, out_features, 576)
    x = normal(20, 576)
    y = case.linear(x)
    assert relative_error(y[:, -7:], (x.double() @ case.weight.double().t())[:, -7:]) <= BOUNDS[torch.float32]
