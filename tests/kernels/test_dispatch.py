"""The kernels that are picked against a float64 product with the decoded weight."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from service.errors import SettingError
from service.kernels import dispatch, native, reference, self_check
from service.numerics.encode import EncodedWeight, decode, encode
from service.numerics.schemes import QuantScheme, parse_scheme
from tests.kernels.support import computing_with

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SCHEMES = ["w8a16", "w8a16-g32", "w4a16-g64", "w4a16-g128-sym", "nf4", "fp4"]
MORE_NATIVE_SCHEMES = [
    *("w4a16-row", "w4a16-row-sym", "w4a16-row-float", "w4a16-g16-float", "w4a16-g64+mse", "w4a16-g128+hqq", "absmax"),
    *("q8_0", "q4_0", "q4_1"),
]
ISAS = [isa for isa in dispatch.ISAS if not dispatch.obstacle(isa)]
# Relative to ||y||. bfloat16 rounds twice by at most 2^-8: sums and results, or weights and results. float16 is
# computed in float32 and rounds the results by 2^-11. float32 sums of up to 4095 products stay below 1e-5.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2 * 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every kind of kernels that this machine runs, one after another."""
    with computing_with(request.param):
        yield request.param


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
        out_features = len(self.weight)
        return dispatch.linear(
            x, qweight, scales, zero_points, scheme=self.scheme, out_features=out_features, bias=bias
        )


def make_case(name: str, out_features: int, in_features: int) -> Case:
    scheme = parse_scheme(name)
    encoded = encode(normal(out_features, in_features).mul_(0.02), scheme)
    weight = decode(*encoded[:3], scheme=scheme, out_features=out_features, in_features=in_features)
    return Case(encoded, weight, scheme)


cached_case = cache(make_case)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected).norm() / expected.norm())


def assert_product(case: Case, x: Tensor) -> None:
    """Compare the product, with a bias and without, with that of the decoded weight."""
    bias = normal(len(case.weight)).to(x)
    expected = x.cpu().double() @ case.weight.double().t()
    y, y_with_bias = case.linear(x), case.linear(x, bias)
    assert y.dtype == y_with_bias.dtype == x.dtype
    assert relative_error(y, expected) <= BOUNDS[x.dtype]
    assert relative_error(y_with_bias, expected + bias.cpu().double()) <= BOUNDS[x.dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("size", [(33, 96), (300, 4095)], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_product_is_right_in_every_dtype_on_every_device(
    name: str, size: tuple[int, int], rows: int, dtype: torch.dtype, device: str
) -> None:
    assert_product(cached_case(name, *size), normal(rows, size[1]).to(device, dtype))


@pytest.mark.parametrize("size", [(33, 96), (17, 100), (48, 1111)], ids=str)
@pytest.mark.parametrize("name", MORE_NATIVE_SCHEMES)
@pytest.mark.usefixtures("isa")
def test_formats_with_other_scales_and_offsets_multiply_natively(name: str, size: tuple[int, int]) -> None:
    case = cached_case(name, *size)
    assert native.takes(case.scheme)
    for rows in (1, 3, 20, 130):
        for dtype in (torch.bfloat16, torch.float32):
            assert_product(case, normal(rows, size[1]).to(dtype))


@pytest.mark.parametrize("name", ["w2a16", "w8a16-asym", "w5a16-float", "nf4-dq", "fp8", "q5_1", "q4_k"])
def test_formats_without_a_kernel_are_left_to_torch(name: str) -> None:
    case = make_case(name, 33, 256)
    assert not native.takes(case.scheme)
    for dtype in BOUNDS:
        assert_product(case, normal(5, 256).to(dtype))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_wrong_weight_would_be_noticed(name: str) -> None:
    case = make_case(name, 48, 576)
    x = normal(3, 576)
    case.encoded.scales[1] *= 1.5  # of the second strip, or of the second row
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
@pytest.mark.usefixtures("isa")
def test_strided_activations_give_the_same_as_their_copy(name: str, rows: int) -> None:
    case = make_case(name, 48, 576)
    x = normal(576, rows).bfloat16().t()
    assert torch.equal(case.linear(x), case.linear(x.contiguous()))


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.usefixtures("isa")
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
@pytest.mark.usefixtures("isa")
def test_row_scales_are_not_rounded_to_bfloat16(rows: int) -> None:
    scale = 1 + 2**-8 + 2**-12  # bfloat16 would make 1 + 2^-7 of it, one unit in the last place too many
    x = torch.eye(rows, 576).bfloat16()
    y = dispatch.linear(
        x,
        torch.ones(3, 18 * 512, dtype=torch.int8),
        torch.full((48,), scale),
        None,
        scheme=parse_scheme("w8a16"),
        out_features=48,
        bias=torch.full((48,), -1, dtype=torch.bfloat16),
    )
    assert (y == torch.tensor(2**-8 + 2**-12).bfloat16()).all()


def test_what_is_selected_computes(isa: str) -> None:
    case, x = make_case("w8a16", 64, 576), normal(1, 576).bfloat16()
    is_described = len(dispatch._kernels.weights)
    by_torch = reference.linear(x, *case.encoded[:3], scheme=case.scheme, out_features=64, bias=None)
    assert torch.equal(case.linear(x), by_torch) or isa != "torch"
    assert (len(dispatch._kernels.weights) == is_described) == (isa == "torch")
    assert dispatch.kernel_name() == ("torch" if isa == "torch" else f"native-{isa}")


@pytest.mark.skipif(bool(dispatch.obstacle("avx2")), reason="this machine has no AVX2")
def test_float32_activations_meet_the_best_kernels_that_take_them(isa: str) -> None:
    expected = {"torch": "torch", "baseline": "native-baseline"}.get(isa, "native-avx2")
    assert dispatch.kernel_name("cpu", torch.float32) == expected


def test_other_activations_and_devices_meet_torch(isa: str) -> None:
    case, num_described = make_case("w8a16", 64, 576), len(dispatch._kernels.weights)
    case.linear(normal(1, 576).half())
    assert len(dispatch._kernels.weights) == num_described, isa
    assert dispatch.kernel_name("cpu", torch.float16) == "torch"
    assert dispatch.kernel_name("cuda", torch.bfloat16) == "torch"


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.usefixtures("isa")
def test_a_bias_may_have_another_dtype_and_any_strides(name: str) -> None:
    case, x, wide = make_case(name, 48, 576), normal(3, 576).bfloat16(), normal(48, 2)
    for bias in (wide[:, 0].contiguous(), wide.bfloat16()[:, 0]):
        expected = x.double() @ case.weight.double().t() + bias.double()
        assert relative_error(case.linear(x, bias), expected) <= BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.usefixtures("isa")
def test_buffers_that_move_or_change_are_read_where_they_are(name: str) -> None:
    case, x = make_case(name, 48, 576), normal(2, 576).bfloat16()
    before = case.linear(x)
    qweight, scales, zero_points, *figures = case.encoded
    copies = qweight.clone(), scales.clone(), None if zero_points is None else zero_points.clone()
    scales.zero_()
    assert (case.linear(x) == 0).all()
    assert torch.equal(case._replace(encoded=EncodedWeight(*copies, *figures)).linear(x), before)


@pytest.mark.usefixtures("isa")
def test_an_address_with_another_weight_gives_the_product_of_that() -> None:
    storage, x = torch.empty(1 << 16, dtype=torch.uint8), normal(2, 64).bfloat16()
    for name, out_features in [("w4a16-g64-sym", 48), ("w4a16-g64", 48), ("nf4", 48), ("fp4", 48), ("nf4", 33)]:
        case = make_case(name, out_features, 64)
        codes = case.encoded.qweight
        case = case._replace(
            encoded=case.encoded._replace(qweight=storage[: codes.numel()].view_as(codes).copy_(codes))
        )
        assert_product(case, x)


@pytest.mark.parametrize("rows", [1, dispatch.FEW_ROWS, dispatch.FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(33, 96), (64, 100), (300, 575)], ids=str)
@pytest.mark.usefixtures("isa")
def test_an_unquantized_weight_is_multiplied_too(size: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
    weight, x, bias = normal(*size).to(dtype), normal(1, rows, size[1]).to(dtype), normal(size[0]).to(dtype)
    expected = x.double() @ weight.double().t()
    assert relative_error(dispatch.linear_unquantized(x, weight, None), expected) <= BOUNDS[dtype]
    assert relative_error(dispatch.linear_unquantized(x, weight, bias), expected + bias.double()) <= BOUNDS[dtype]
    by_columns = weight.t().contiguous().t()
    assert relative_error(dispatch.linear_unquantized(x, by_columns, None), expected) <= BOUNDS[dtype]


def test_a_selection_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture, isa: str) -> None:
    with caplog.at_level(logging.INFO, "service.kernels.dispatch"):
        dispatch.select_isa(isa)
        dispatch.select_isa("auto")
    chosen, automatic = caplog.messages
    assert chosen == f"kernels: {'torch' if isa == 'torch' else f'native-{isa}'} (--kernel-isa says so)"
    assert automatic == f"kernels: {dispatch.kernel_name()} ({dispatch.choose('auto').why})"


@pytest.mark.parametrize("name", sorted({*dispatch.ISAS, "avx1024"} - {*ISAS}))
def test_kernels_that_the_machine_lacks_are_refused_with_those_it_has(name: str, isa: str) -> None:
    with pytest.raises(
        SettingError, match=rf"^--kernel-isa {name}: .*; use {', '.join(['auto', *ISAS[:-1]])} or {ISAS[-1]}$"
    ):
        dispatch.select_isa(name)
    assert dispatch.kernel_name() == ("torch" if isa == "torch" else f"native-{isa}")


def test_auto_is_the_best_and_says_what_keeps_from_a_better_one() -> None:
    isa, why = dispatch.choose("auto")
    assert isa == ISAS[-1]
    for better in dispatch.ISAS[dispatch.ISAS.index(isa) + 1 :]:
        assert dispatch.obstacle(better) in why
    assert native.load().library is not None or why == native.load().obstacle


@pytest.mark.skipif(bool(dispatch.obstacle("baseline")), reason="there is no kernel library")
def test_kernels_whose_products_are_wrong_give_way_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    best = dispatch.choose("auto").isa
    try:
        dispatch.select_isa("auto", is_right=lambda _: dispatch.kernel_name() != f"native-{best}")
        assert dispatch.kernel_name() != f"native-{best}"
        assert f"native-{best} give wrong results" in caplog.text
        with pytest.raises(SettingError, match=f"--kernel-isa {best}: its results were wrong on this machine"):
            dispatch.select_isa(best)
    finally:
        dispatch._wrong.clear()
        dispatch.select_isa("auto")


@pytest.mark.parametrize("error", [0.0, 0.02, torch.nan])
def test_the_check_of_products_notices_two_percent_and_nan(error: float) -> None:
    def multiply(x: Tensor, encoded: EncodedWeight, scheme: QuantScheme) -> Tensor:
        y = dispatch.linear(x, *encoded[:3], scheme=scheme, out_features=65, bias=None)
        return y * (1 + error)

    assert self_check.agrees(multiply) == (error == 0)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.ones(1, 48, dtype=torch.bfloat16), torch.ones(8, 64, dtype=torch.bfloat16), None),
        (torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(8, 64), None),
        (torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(8, 64, dtype=torch.bfloat16), torch.ones(8)),
        (torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(8, 64, dtype=torch.bfloat16), torch.ones(5).bfloat16()),
    ],
    ids=["width", "dtype", "dtype of the bias", "length of the bias"],
)
def test_unquantized_operands_that_do_not_fit_are_refused_by_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    with pytest.raises(RuntimeError):
        dispatch.linear_unquantized(x, weight, bias)


@pytest.mark.parametrize("num_rows", [1, 40])
def test_a_bias_of_another_length_is_refused(isa: str, num_rows: int) -> None:
    case = make_case("w8a16", 33, 96)
    with pytest.raises(RuntimeError, match="size"):
        case.linear(normal(num_rows, 96).bfloat16(), torch.ones(5, dtype=torch.bfloat16))
