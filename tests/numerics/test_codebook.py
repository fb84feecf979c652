"""NF4 and FP4: the tables, the nearest level against float64, bitsandbytes' own codes, error bounds and edge cases."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from service.errors import QuantizationError
from service.numerics.codebook import dequantize_levels, levels, quantize_to_levels, thresholds
from service.numerics.schemes import FP4, NF4, QuantScheme, parse_scheme

CODEBOOKS = pytest.mark.parametrize("scheme", [NF4, FP4], ids=["nf4", "fp4"])
WIDTHS = [1, 15, 64, 96, 100, 576, 4095]
FLOAT32_ROUNDING = 4 * 2**-24  # of scales: of a reciprocal, a product, a threshold and the decoded weight

CODES_OF_BITSANDBYTES = {
    ("nf4", torch.float32): "7a6c5c648aa2c6b54f55f3c1ef05b0cc05fc14611442b739998a17e4c6d1900c",
    ("nf4", torch.bfloat16): "ebe9806ae1d65a450fa25ce4f31fced829e06aab397dc158bcea534c83a10320",
    ("fp4", torch.float32): "75e556e125c52d0ab6775c6386699e9e9728378658c3915b3246ba318cb594bf",
    ("fp4", torch.bfloat16): "959bc43d542780c0d8803946f3b17f0e99bf1d9386317cc946eafdb2e1a80014",
}
"""SHA-256 of the codes, one a byte, that bitsandbytes 0.50.2 gives `bell` on the CPU, blocks of 64 (2026-11-21)."""


def bell(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Nearly N(0, 1) from integers alone, so that no machine rounds it otherwise: the sum of twelve uniforms."""
    uniform = np.random.default_rng(seed).integers(-(2**19), 2**19, (rows, columns, 12))
    return torch.from_numpy((uniform.sum(2) / 2**20).astype(np.float32))


def decoded(weight: Tensor, scheme: QuantScheme) -> Tensor:
    codes, scales, _ = quantize_to_levels(weight, scheme)
    return dequantize_levels(codes, scales, scheme)


def scales_of_weights(scales: Tensor, columns: int) -> Tensor:
    return scales[:, torch.arange(columns) // 64].double()


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    offset, inverse = 0.9677083, NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.sort([*negative, 0, *positive]) / max(positive)
    assert np.abs(levels(NF4).numpy() - expected).max() <= 2**-22


def test_fp4_levels_are_sign_and_magnitude_in_twelfths() -> None:
    assert (levels(FP4)[:8] * 12).tolist() == pytest.approx([0, 0.0625, 8, 12, 4, 6, 2, 3], rel=2**-23)
    assert torch.equal(levels(FP4)[8:], -levels(FP4)[:8])


def test_levels_of_integers_are_codes_less_an_implied_zero_point() -> None:
    assert levels(parse_scheme("w4a16-g128")).tolist() == list(range(16))
    assert levels(parse_scheme("w4a16-g128-sym")).tolist() == list(range(-8, 8))


@CODEBOOKS
def test_codes_by_rising_level_are_all_codes_and_thresholds_lie_between(scheme: QuantScheme) -> None:
    bounds, order = thresholds(scheme)
    rising = levels(scheme)[order.long()]
    assert sorted(order.tolist()) == list(range(16))
    assert (rising.diff() >= 0).all()
    assert torch.equal(bounds, (rising[1:] + rising[:-1]) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", WIDTHS)
@CODEBOOKS
def test_the_level_is_the_nearest_in_float64(scheme: QuantScheme, columns: int, dtype: torch.dtype) -> None:
    weight = bell(9, columns, seed=columns).mul(0.02).to(dtype)
    codes, scales, zero_points = quantize_to_levels(weight, scheme)
    assert (codes.dtype, scales.dtype, zero_points) == (torch.uint8, torch.float32, None)
    for first in range(0, columns, 64):
        assert torch.equal(scales[:, first // 64], weight[:, first : first + 64].float().abs().amax(1))
    exact = weight.double() / scales_of_weights(scales, columns)
    distances = (exact[..., None] - levels(scheme).double()).abs()
    chosen = distances.gather(2, codes[..., None].long())[..., 0]
    assert (chosen <= distances.amin(2) + FLOAT32_ROUNDING).all()


@pytest.mark.parametrize(("name", "dtype"), CODES_OF_BITSANDBYTES, ids=str)
def test_codes_are_those_of_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    codes = quantize_to_levels(bell(256, 1024).to(dtype), parse_scheme(name)).codes
    assert hashlib.sha256(codes.numpy().tobytes()).hexdigest() == CODES_OF_BITSANDBYTES[name, dtype]


@CODEBOOKS
def test_a_weight_on_a_threshold_takes_the_lower_level_and_one_above_the_upper(scheme: QuantScheme) -> None:
    bounds, order = thresholds(scheme)
    above = torch.nextafter(bounds, torch.tensor(2.0))
    weight = torch.stack([torch.cat([torch.ones(1), part]) for part in (bounds, above)])  # a scale of 1
    on, over = quantize_to_levels(weight, scheme).codes[:, 1:]
    assert torch.equal(on, order[:-1])
    assert torch.equal(over, order[1:])


@pytest.mark.parametrize(("scheme", "half_gap"), [(NF4, (1 - 0.6961928) / 2), (FP4, 1 / 6)], ids=["nf4", "fp4"])
@pytest.mark.parametrize("columns", WIDTHS)
def test_error_stays_within_half_the_widest_gap(scheme: QuantScheme, half_gap: float, columns: int) -> None:
    weight = torch.cat([bell(32, columns), torch.linspace(-1, 1, 32 * columns).view(32, columns)])
    codes, scales, _ = quantize_to_levels(weight, scheme)
    errors = (dequantize_levels(codes, scales, scheme).double() - weight.double()).abs()
    relative = errors / scales_of_weights(scales, columns)
    assert (relative <= half_gap + FLOAT32_ROUNDING).all()
    if columns >= 576:
        assert relative.max() >= 0.99 * half_gap  # no smaller bound holds


@pytest.mark.parametrize(("scheme", "floor_db"), [(NF4, 20.6), (FP4, 18.2)], ids=["nf4", "fp4"])
def test_normal_weights_keep_the_expected_signal_to_noise_ratio(scheme: QuantScheme, floor_db: float) -> None:
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    noise = decoded(weight, scheme) - weight
    assert 20 * float(torch.log10(weight.norm() / noise.norm())) >= floor_db


@CODEBOOKS
def test_levels_times_a_power_of_two_are_kept_exactly(scheme: QuantScheme) -> None:
    weight = torch.cat([levels(scheme)] * 4)[None] * 2**-7
    assert torch.equal(decoded(weight, scheme), weight)


@CODEBOOKS
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -1e-38], ids=str)
def test_groups_of_nothing_normal_are_zeros_with_scale_one(scheme: QuantScheme, value: float) -> None:
    weight = bell(3, 100)
    weight[1, 64:] = value
    codes, scales, _ = quantize_to_levels(weight, scheme)
    assert scales[1, 1] == 1
    assert (codes[1, 64:] == (7 if scheme == NF4 else 0)).all()
    assert not dequantize_levels(codes, scales, scheme)[1, 64:].any()
    assert dequantize_levels(codes, scales, scheme)[1, :64].any()


@CODEBOOKS
@pytest.mark.parametrize("value", [2**-126, 1e-30, 3e38], ids=str)
def test_the_smallest_and_largest_scales_work(scheme: QuantScheme, value: float) -> None:
    weight = levels(scheme)[None] * value
    assert (decoded(weight, scheme).double() - weight.double()).abs().max() <= value * 2**-20


@CODEBOOKS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("column", [0, 99])
def test_nan_and_infinity_are_refused(scheme: QuantScheme, column: int, value: float) -> None:
    weight = bell(3, 100)
    weight[2, column] = value
    with pytest.raises(QuantizationError, match="holds NaN or infinity"):
        quantize_to_levels(weight, scheme)


@CODEBOOKS
def test_the_weight_itself_is_left_alone_and_a_vector_is_refused(scheme: QuantScheme) -> None:
    weight = bell(4, 100)
    copy = weight.clone()
    quantize_to_levels(weight, scheme)
    assert torch.equal(weight, copy)
    with pytest.raises(QuantizationError, match=r"must be \[out, in\] and not empty"):
        quantize_to_levels(weight[0], scheme)
