"""Rounding of weights to integers that share a scale: `w ~ (codes - zero_points) * scales`, or `+ offsets`.

A group is `group_size` neighbours of one row (0: the whole row); the last one of a row may be short. Scales of rows are
float32, scales of groups, and float offsets, bfloat16: its exponent range is that of float32, so that no group over- or
underflows. Codes are chosen against the rounded scale s, and offset m. Of b bits, with n = 2^b - 1 steps:

    scheme          scale s before rounding             codes                       |w - w'| at most
    8 bit, -sym     max|w| / 127                        int8, -127..127             s/2
    -sym            signed max / -h, h = 2^(b-1)        uint8, 0..n,                |s|/2 where w/s <= h - 1/2,
                                                        zero point h                else (1 + h/256) |s|
    -asym           (max(w,0) - min(w,0)) / n           uint8, 0..n,                (1/2 + n/256) s
                                                        zero point round(-min/s)
    -float          (max(w) - min(w)) / n, m = min(w)   uint8, 0..n                 (1/2 + n/256) s + |m|/256

With 8 bits, -asym and -float count from -128 instead of 0, so that all 8-bit codes are int8: m is 128 s above min(w).

Rounding is half to even. The bounds hold up to float32 rounding; they follow from the relative error of a
bfloat16 scale, 2^-8: it moves the largest of n steps by n/256, and 127/256 < 1/2 keeps 8-bit codes within
127 without a clamp. A group so small that its scale would be below the smallest normal float, 2^-126, is
stored as zeros with scale 1, and so is a group of zeros; with float offsets, as its offset.

Source: r = S (q - Z), arXiv:1712.05877 eq. 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from service.errors import QuantizationError
from service.numerics.schemes import QuantScheme

NOT_FINITE: Final = "the weight holds NaN or infinity, all of it must be finite; repair the checkpoint"


class Bounds(NamedTuple):
    """Smallest and largest weight of what shares a scale: float32[rows, groups, 1], or of a whole tensor [1, 1, 1]."""

    low: Tensor
    high: Tensor


class QuantizedWeight(NamedTuple):
    """Codes of a weight [out, in] and what maps them back.

    Attributes:
        codes: int8[out, in] for 8 bit, else uint8[out, in].
        scales: [out, values]: one value per group, or a scale and an offset, or bytes of a k-quant; negative scales
            occur with `-sym`.
        zero_points: uint8[out, num_groups], int8 for 8 bit; None if none are stored, which implies `centre`.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None


def num_groups(in_features: int, group_size: int) -> int:
    """Scales per row."""
    return -(-in_features // group_size) if group_size else 1


def require_matrix(weight: Tensor) -> None:
    """Refuse what has no rows to quantize.

    Raises:
        QuantizationError: the weight is not 2-D or is empty.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise QuantizationError(
            f"a weight of shape {list(weight.shape)} cannot be quantized, it must be [out, in] and not empty; "
            "keep it as it is with NAME=none in the recipe"
        )


def refuse_nonfinite(scales: Tensor) -> None:
    """Refuse weights whose scales are NaN or infinite, which they are if a weight of their group is.

    Raises:
        QuantizationError: always with the same text.
    """
    if not scales.isfinite().all():
        raise QuantizationError(NOT_FINITE)


def centre(scheme: QuantScheme) -> int:
    """The zero point that is implied where none is stored."""
    return 1 << scheme.bits - 1 if scheme.offset == "sym" and scheme.bits < 8 else 0


def code_bounds(scheme: QuantScheme) -> tuple[int, int]:
    """Smallest and largest code."""
    if scheme.bits == 8:
        return -127 if scheme.offset == "sym" else -128, 127
    return 0, (1 << scheme.bits) - 1


def code_dtype(scheme: QuantScheme) -> torch.dtype:
    """Dtype of codes, packed or not, and of zero points before they are."""
    return torch.int8 if scheme.bits == 8 else torch.uint8


def quantize(
    weight: Tensor, scheme: QuantScheme, *, scale_dtype: torch.dtype | None = None, bounds: Bounds | None = None
) -> QuantizedWeight:
    """Round a weight to nearest.

    Args:
        weight: float[out, in] of any float dtype; computed in float32.
        scale_dtype: float dtype to round scales and offsets to, in place of the one above.
        bounds: of the whole tensor, for one scale per tensor.

    Raises:
        QuantizationError: the weight is not 2-D, is empty, or holds NaN or infinity.
    """
    require_matrix(weight)
    dtype = scale_dtype or (torch.bfloat16 if scheme.group_size else torch.float32)
    parts = [
        _round_groups(grouped, bounds or bounds_of(grouped), scheme, dtype)
        for _, grouped in by_group(weight.float(), scheme.group_size)
    ]
    codes, scales = torch.cat([part.codes for part in parts], 1), torch.cat([part.scales for part in parts], 1)
    points = [part.zero_points for part in parts if part.zero_points is not None]
    refuse_nonfinite(scales)
    return QuantizedWeight(codes, scales, torch.cat(points, 1) if points else None)


def bounds_of(grouped: Tensor) -> Bounds:
    """Of each group of [out, groups, weights]."""
    return Bounds(grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True))


def dequantize(codes: Tensor, scales: Tensor, zero_points: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Map codes [out, in] back to float32 weights; products with bfloat16 scales are exact.

    Args:
        scales: float[out, num_groups], or with offsets, which alternate with scales, [out, 2 * num_groups].
    """
    weight = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    num_values = 2 if scheme.offset == "float" else 1
    values = scales.float().view(len(codes), num_groups(codes.shape[1], scheme.group_size), num_values)
    signed = codes.view(torch.int8)  # 0..63 is the same in both; torch converts from int8 several times faster
    by_codes, by_weights = by_group(signed, scheme.group_size), by_group(weight, scheme.group_size)
    for (groups, code), (_, product) in zip(by_codes, by_weights, strict=True):
        if zero_points is None:
            product.copy_(code - centre(scheme) if centre(scheme) else code)
        elif scheme.bits == 8:
            product.copy_(code).sub_(zero_points[:, groups, None])
        else:
            product.copy_(code - zero_points[:, groups, None].view(torch.int8))
        product.mul_(values[:, groups, :1])
        if scheme.offset == "float":
            product.add_(values[:, groups, 1:])
    return weight


def by_group(matrix: Tensor, group_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Views [out, groups, weights] of the full groups, then of the short one if there is one, and which they are."""
    size = group_size or matrix.shape[1]
    full = matrix.shape[1] // size
    if full:
        yield slice(0, full), matrix[:, : full * size].view(len(matrix), full, size)
    if matrix.shape[1] % size:
        yield slice(full, full + 1), matrix[:, None, full * size :]


def to_codes(steps: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes [out, weights] from whole numbers float32[out, groups, weights]; overwrites them."""
    codes = steps.clamp_(*code_bounds(scheme)).to(torch.int8).flatten(1)
    return codes if scheme.bits == 8 else codes.view(torch.uint8)


def _round_groups(weight: Tensor, bounds: Bounds, scheme: QuantScheme, dtype: torch.dtype) -> QuantizedWeight:
    """Round float32[out, groups, weights]; codes are flat, scales and zero points [out, values]."""
    low, high = bounds
    first, last = code_bounds(scheme)
    if scheme.offset == "asym":
        low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.offset != "sym":
        scales = high / (last - first) - low / (last - first)  # high - low may overflow
    elif scheme.bits == 8:
        scales = torch.maximum(high, -low) / 127
    else:
        scales = torch.where(high >= -low, high, low) / -centre(scheme)
    scales = scales.to(dtype)
    is_tiny = scales.abs() < torch.finfo(dtype).tiny
    scales = scales.masked_fill_(is_tiny, 1).expand(*weight.shape[:2], 1)
    if scheme.offset == "float":
        offsets = stored_offsets(torch.where(is_tiny, low, low - first * scales.float()), dtype)
        codes = to_codes((weight - offsets).div_(scales).round_(), scheme)
        return QuantizedWeight(codes, torch.stack((scales, offsets), 2).flatten(1), None)
    steps = weight.div(scales).round_()
    if scheme.offset == "sym":
        return QuantizedWeight(to_codes(steps.add_(centre(scheme)), scheme), scales.flatten(1), None)
    points = low.div(scales).round_().neg_().add_(first).clamp_(first, last)
    zero_points = points[:, :, 0].to(torch.int16).to(code_dtype(scheme))
    return QuantizedWeight(to_codes(steps.add_(points), scheme), scales.flatten(1), zero_points)


def stored_offsets(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Offsets rounded to their dtype; the largest floats to the largest that it has."""
    return offsets.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
