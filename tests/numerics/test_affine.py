"""Round to nearest: an independent oracle in numpy, error bounds, quality floors and edge cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from service.errors import QuantizationError
from service.numerics.affine import Bounds, QuantizedWeight, dequantize, quantize
from service.numerics.schemes import QuantScheme, parse_scheme

SCHEMES = [
    *("w8a16", "w8a16-g32", "w8a16-g128-asym", "w4a16-g64", "w4a16-row", "w4a16-g64-sym", "w4a16-g128-sym"),
    *("w2a16", "w3a16-g32-sym", "w5a16-g64", "w6a16-row-sym"),
]
FLOAT_SCHEMES = ["w8a16-float", "w2a16-float", "w4a16-g64-float", "w6a16-g32-float"]
WIDTHS = [1, 96, 100, 576, 4095]
FLOAT32_ROUNDING = 127 * 2**-23  # in steps: of a quotient and a product of at most 127 steps

Array = npt.NDArray[Any]


def normal(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def decoded(quantized: QuantizedWeight, scheme: QuantScheme) -> Tensor:
    return dequantize(*quantized, scheme)


def to_numpy(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.double().numpy()


def oracle(group: Array, scheme: QuantScheme) -> tuple[Array, float, float]:
    """Codes, scale and zero point of one group, in float64 throughout."""
    high, low = float(group.max()), float(group.min())
    steps, half, first = 2**scheme.bits - 1, 2 ** (scheme.bits - 1), -128 if scheme.bits == 8 else 0
    if scheme.offset == "sym" and scheme.bits == 8:
        scale = max(high, -low) / 127
        return np.clip(np.rint(group / scale), -127, 127), scale, 0
    if scheme.offset == "sym":
        scale = group[np.abs(group).argmax()] / -half
        return np.clip(np.rint(group / scale), -half, half - 1) + half, scale, half
    high, low = max(high, 0), min(low, 0)
    scale = (high - low) / steps
    zero = first + np.clip(np.rint(-low / scale), 0, steps)
    return np.clip(np.rint(group / scale) + zero, first, first + steps), scale, zero


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_equal_a_float64_oracle(name: str, columns: int) -> None:
    scheme = parse_scheme(name)
    weight = normal(9, columns)
    codes, scales, zero_points = quantize(weight, scheme, scale_dtype=torch.float32)
    assert (zero_points is None) == (scheme.offset == "sym")
    size = scheme.group_size or columns
    num_wrong = 0
    for row in range(9):
        for group, first in enumerate(range(0, columns, size)):
            part = slice(first, first + size)
            expected, scale, zero = oracle(to_numpy(weight[row, part]), scheme)
            assert float(scales.view(9, -1)[row, group]) == pytest.approx(scale, rel=2**-22)
            assert zero_points is None or int(zero_points[row, group]) == zero
            num_wrong += int((to_numpy(codes[row, part]) != expected).sum())
    assert num_wrong <= 1e-4 * weight.numel()  # a quotient within float32 rounding of a tie may go either way


def step_errors(weight: Tensor, quantized: QuantizedWeight, scheme: QuantScheme) -> tuple[Array, Array]:
    """|w - w'| and w, both in steps."""
    groups = torch.arange(weight.shape[1]) // (scheme.group_size or weight.shape[1])
    scales = to_numpy(quantized.scales.view(len(weight), -1)[:, groups])
    exact = to_numpy(weight)
    return np.abs(exact - to_numpy(decoded(quantized, scheme))) / np.abs(scales), exact / scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_error_stays_within_the_documented_bound(name: str, columns: int, dtype: torch.dtype) -> None:
    scheme = parse_scheme(name)
    weight = normal(64, columns, seed=columns).mul(0.02).to(dtype)
    errors, steps = step_errors(weight, quantize(weight, scheme), scheme)
    half = 2 ** (scheme.bits - 1)
    bound: Array | float = 1 / 2
    if scheme.offset == "asym":
        bound = 1 / 2 + (2**scheme.bits - 1) / 256
    elif scheme.bits < 8:
        bound = np.where(steps <= half - 0.5, 1 / 2, 1 + half / 256)
    assert (errors <= bound + FLOAT32_ROUNDING).all()


@pytest.mark.parametrize("columns", [96, 4095])
@pytest.mark.parametrize("name", FLOAT_SCHEMES)
def test_error_with_a_float_offset_stays_within_the_documented_bound(name: str, columns: int) -> None:
    scheme = parse_scheme(name)
    weight = normal(64, columns, seed=columns).mul(0.02)
    quantized = quantize(weight, scheme)
    assert quantized.zero_points is None
    groups = torch.arange(columns) // (scheme.group_size or columns)
    scales, offsets = quantized.scales.double().view(64, -1, 2)[:, groups].unbind(2)
    errors = (decoded(quantized, scheme).double() - weight.double()).abs()
    bound = scales * (1 / 2 + (2**scheme.bits - 1) / 256 + FLOAT32_ROUNDING) + offsets.abs() / 256
    assert (errors <= bound).all()


@pytest.mark.parametrize("name", ["w8a16-float", "w4a16-g64-float"])
def test_a_float_offset_gives_groups_far_from_zero_all_their_steps(name: str) -> None:
    scheme = parse_scheme(name)
    weight = 1 + normal(4, 256).mul(0.1)
    error = (decoded(quantize(weight, scheme, scale_dtype=torch.float32), scheme) - weight).abs().max()
    assert error <= 0.6 * (float(weight.max()) - float(weight.min())) / (2**scheme.bits - 1)


@pytest.mark.parametrize("name", ["w8a16-tensor-sym", "w8a16-tensor-asym", "w4a16-tensor-float"])
def test_one_scale_per_tensor_is_that_of_the_extremes(name: str) -> None:
    scheme = parse_scheme(name)
    weight = normal(8, 100)
    weight[5, 5], weight[6, 6] = 40, -30
    low, high = weight.aminmax()
    quantized = quantize(weight, scheme, bounds=Bounds(low.view(1, 1, 1), high.view(1, 1, 1)))
    assert (quantized.scales.view(8, -1) == quantized.scales[0]).all()
    step = float(quantized.scales[0, 0])
    assert step == pytest.approx({"sym": 40 / 127, "asym": 70 / 255, "float": 70 / 15}[scheme.offset], rel=1e-6)
    assert (decoded(quantized, scheme) - weight).abs().max() <= 0.51 * step


@pytest.mark.parametrize(
    ("name", "floor_db"),
    [("w8a16", 40.9), ("w8a16-g128", 43.0), ("w4a16-g64", 20.7), ("w4a16-g128", 19.8), ("w4a16-g128-sym", 19.5)],
)
def test_normal_weights_keep_the_expected_signal_to_noise_ratio(name: str, floor_db: float) -> None:
    scheme = parse_scheme(name)
    weight = normal(256, 4096)
    noise = decoded(quantize(weight, scheme), scheme) - weight
    assert 20 * float(torch.log10(weight.norm() / noise.norm())) >= floor_db


@pytest.mark.parametrize("name", [*SCHEMES, "w3a16-row"])
def test_groups_of_zeros_decode_to_zeros_with_scale_one(name: str) -> None:
    scheme = parse_scheme(name)
    weight = normal(3, 100)
    weight[1] = 0
    quantized = quantize(weight, scheme)
    assert not decoded(quantized, scheme)[1].any()
    assert (quantized.scales[1] == 1).all()


@pytest.mark.parametrize("value", [1.5, -1.5, 1e-30, 3e38, -3e38])
@pytest.mark.parametrize("name", [*SCHEMES, *FLOAT_SCHEMES])
def test_constant_groups_decode_to_the_constant_within_the_rounding_of_the_scale(name: str, value: float) -> None:
    scheme = parse_scheme(name)
    quantized = quantize(torch.full((2, 100), value), scheme)
    assert decoded(quantized, scheme).double() / value == pytest.approx(1, rel=2**-8 if scheme.group_size else 2**-22)


@pytest.mark.parametrize("name", ["w8a16-g32", "w4a16-g64", "w4a16-g64-sym"])
def test_an_outlier_spoils_its_own_group_only(name: str) -> None:
    scheme = parse_scheme(name)
    weight = normal(2, 192)
    spoiled = weight.clone()
    spoiled[0, 70] = 1e4
    clean, dirty = decoded(quantize(weight, scheme), scheme), decoded(quantize(spoiled, scheme), scheme)
    first = 70 // scheme.group_size * scheme.group_size
    differs = (clean != dirty).any(0)
    assert differs[first : first + scheme.group_size].any()
    assert not differs[:first].any()
    assert not differs[first + scheme.group_size :].any()
    assert float(dirty[0, 70]) == pytest.approx(1e4, rel=2**-8)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 1e-38, 1e-37, 1e-36])
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_near_the_smallest_floats_are_never_far_off(name: str, magnitude: float) -> None:
    scheme = parse_scheme(name)
    weight = normal(4, 200).mul(magnitude)
    quantized = quantize(weight, scheme)
    assert (quantized.scales.abs() >= 2**-126).all()
    errors = (decoded(quantized, scheme).double() - weight.double()).abs()
    smallest_kept = 127 * 2**-126  # a group with a larger maximum has a normal scale
    assert (errors <= max(smallest_kept, float(weight.abs().max()) / 7)).all()


def test_scales_are_float32_by_row_and_bfloat16_by_group() -> None:
    weight = normal(3, 100)
    assert quantize(weight, parse_scheme("w8a16")).scales.dtype == torch.float32
    codes, scales, zero_points = quantize(weight, parse_scheme("w4a16-g64"))
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.uint8, torch.bfloat16, (3, 2))
    assert zero_points is not None
    assert (zero_points.dtype, zero_points.shape) == (torch.uint8, (3, 2))


def test_the_weight_itself_is_left_alone() -> None:
    weight = normal(4, 100)
    copy = weight.clone()
    for name in SCHEMES:
        quantize(weight, parse_scheme(name))
    assert torch.equal(weight, copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 99])
@pytest.mark.parametrize("name", [*SCHEMES, *FLOAT_SCHEMES])
def test_nan_and_infinity_are_refused(name: str, column: int, value: float) -> None:
    weight = normal(3, 100)
    weight[2, column] = value
    with pytest.raises(QuantizationError, match="holds NaN or infinity"):
        quantize(weight, parse_scheme(name))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), (4, 0)], ids=str)
def test_what_is_no_matrix_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizationError, match="must be \\[out, in\\] and not empty") as caught:
        quantize(torch.zeros(shape), parse_scheme("w8a16"))
    assert str(list(shape)) in str(caught.value)
