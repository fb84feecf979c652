"""What every scheme takes or refuses by name: odd sizes, zeros, constants, outliers, the smallest floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from service.errors import QuantizationError
from service.numerics.encode import EncodedWeight, decode, encode
from service.numerics.schemes import NAMED, QuantScheme, parse_scheme

K_QUANTS = ["q4_k", "q5_k", "q6_k"]
FLOAT16_SCALES = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", *K_QUANTS]
SCHEMES = [
    *("w8a16", "w8a16-asym", "w8a16-g64-float", "w2a16", "w3a16-sym", "w4a16", "w4a16-row-float", "w5a16", "w6a16-row"),
    *("absmax", "zeropoint", "w4a16+mse", "w4a16-asym+mse", "w3a16-sym+mse", "w8a16-sym+mse", "w4a16+hqq", "w2a16+hqq"),
    *(name for name in NAMED if not name.endswith("_m")),
]
ANY_SIZE = [name for name in SCHEMES if name not in K_QUANTS]


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


def decoded(weight: Tensor, encoded: EncodedWeight, scheme: QuantScheme) -> Tensor:
    out_features, in_features = weight.shape
    return decode(*encoded[:3], scheme=scheme, out_features=out_features, in_features=in_features)


def round_trip(weight: Tensor, name: str) -> Tensor:
    scheme = parse_scheme(name)
    found = decoded(weight, encode(weight, scheme), scheme)
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("size", [(1, 96), (3, 100), (2, 576), (1, 4095), (33, 1), (1, 1), (17, 31)], ids=str)
@pytest.mark.parametrize("name", ANY_SIZE)
def test_odd_sizes_keep_their_shape_and_most_of_their_signal(name: str, size: tuple[int, int]) -> None:
    weight = normal(*size)
    found = round_trip(weight, name)
    assert found.shape == weight.shape
    assert (found - weight).norm() <= 0.55 * weight.norm()  # of 2 bits; of one weight per group, of its rounding


@pytest.mark.parametrize("columns", [1, 96, 100, 576, 4095])
@pytest.mark.parametrize("name", K_QUANTS)
def test_rows_that_a_k_quant_cannot_take_are_refused_with_a_remedy(name: str, columns: int) -> None:
    with pytest.raises(QuantizationError, match=f"rows of {columns} weights cannot be stored as {name}.*use q5_0"):
        encode(normal(2, columns), parse_scheme(name))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", SCHEMES)
def test_nan_and_infinity_are_refused(name: str, value: float) -> None:
    weight = normal(18, 256)
    weight[17, 200] = value
    with pytest.raises(QuantizationError, match="holds NaN or infinity"):
        encode(weight, parse_scheme(name))


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_of_zeros_stay_zeros_and_leave_their_neighbours_alone(name: str) -> None:
    scheme, weight = parse_scheme(name), normal(5, 512)
    weight[2] = 0
    found = round_trip(weight, name)
    assert found[2].abs().max() <= (0.05 if scheme.named == "nf4-dq" else 0) * weight.abs().max()
    others = [0, 1, 3, 4]
    assert (found[others] - weight[others]).norm() <= 0.55 * weight.norm()


@pytest.mark.parametrize("value", [0.5, -0.5, 0.02, -3.0])
@pytest.mark.parametrize("name", SCHEMES)
def test_constant_groups_keep_their_value(name: str, value: float) -> None:
    found = round_trip(torch.full((2, 256), value), name)
    bound = 2**-6 if name in K_QUANTS else 2**-7  # a scale of a scale is rounded twice
    assert (found / value - 1).abs().max() <= bound


@pytest.mark.parametrize("name", SCHEMES)
def test_a_single_outlier_is_kept(name: str) -> None:
    weight = normal(4, 512).mul_(0.02)
    weight[1, 300] = 1e4
    found = round_trip(weight, name)
    assert float(found[1, 300]) == pytest.approx(1e4, rel=0.07)
    scheme = parse_scheme(name)
    if not scheme.is_per_tensor and scheme.named != "nf4-dq":
        assert (found[[0, 2, 3]] - weight[[0, 2, 3]]).norm() <= 0.55 * weight[[0, 2, 3]].norm()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 1e-38, 1e-30])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_smallest_floats_become_something_as_small(name: str, magnitude: float) -> None:
    weight = normal(4, 256).mul(magnitude)
    encoded = encode(weight, parse_scheme(name))
    found = decoded(weight, encoded, parse_scheme(name))
    assert found.abs().max() <= 2 * weight.abs().max() + 2**-117
    assert math.isfinite(encoded.noise)


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in FLOAT16_SCALES])
def test_the_largest_floats_are_kept(name: str) -> None:
    weight = normal(4, 256).clamp(-2, 2).mul(5e37)  # a range whose steps and their sums are floats, too
    found = round_trip(weight, name)
    assert (found.double() - weight.double()).norm() <= 0.55 * weight.double().norm()


@pytest.mark.parametrize("name", FLOAT16_SCALES)
def test_what_float16_scales_cannot_hold_is_refused_with_a_remedy(name: str) -> None:
    weight = normal(4, 256).mul(1e9)
    with pytest.raises(QuantizationError, match=f"float16 scales of {name} cannot hold; use w8a16 or w4a16 there"):
        encode(weight, parse_scheme(name))


@pytest.mark.parametrize("name", [name for name in SCHEMES if parse_scheme(name).is_row_local])
def test_a_run_of_strips_encodes_to_its_part_of_the_buffers(name: str) -> None:
    scheme, weight = parse_scheme(name), normal(50, 256)
    whole, part = encode(weight, scheme), encode(weight[16:48], scheme)
    assert torch.equal(whole.qweight[1:3], part.qweight)
    per_strip = len(whole.scales) // 4
    assert torch.equal(whole.scales[per_strip : 3 * per_strip], part.scales)


@pytest.mark.parametrize("name", [name for name in SCHEMES if "+mse" in name])
def test_a_fit_leaves_no_group_worse_than_rounding_to_nearest(name: str) -> None:
    fitted, weight = parse_scheme(name), normal(64, 512)
    nearest = parse_scheme(f"w{fitted.bits}a16-{'g64' if fitted.group_size else 'row'}-{fitted.offset}")
    size = fitted.group_size or 512

    def errors(scheme: QuantScheme) -> Tensor:
        return (decoded(weight, encode(weight, scheme), scheme) - weight).double().square().view(-1, size).sum(1)

    assert (errors(fitted) <= errors(nearest) * (1 + 1e-6)).all()
    assert errors(fitted).sum() <= 0.98 * errors(nearest).sum()
