"""Rounding of weights to integers that share a scale: `w ~ (codes - zero_points) * scales`.

A group is `group_size` neighbours of one row (0: the whole row); the last one of a row may be short.
Scales of rows are float32, scales of groups bfloat16: its exponent range is that of float32, so that no
group over- or underflows. Codes are chosen against the rounded scale s.

    scheme          scale s before rounding             codes                           |w - w'| at most
    8 bit           max|w| / 127                        int8, -127..127                 s/2
    4 bit           (max(w,0) - min(w,0)) / 15          uint8, 0..15,                   (1/2 + 15/256) s
                                                        zero point round(-min/s)
    4 bit, -sym     signed max / -8                     uint8, 0..15, zero point 8      |s|/2 where w/s <= 7.5,
                                                                                        else (1 + 8/256) |s|

Rounding is half to even. The bounds hold up to float32 rounding; they follow from the relative error of a
bfloat16 scale, 2^-8: it moves the largest of n steps by n/256, and 127/256 < 1/2 keeps 8-bit codes within
127 without a clamp. A group so small that its scale would be below the smallest normal float, 2^-126, is
stored as zeros with scale 1, and so is a group of zeros.

Source: r = S (q - Z), arXiv:1712.05877 eq. 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from service.errors import QuantizationError
from service.numerics.schemes import QuantScheme

SYMMETRIC_ZERO_POINT: Final = 8  # of 4-bit codes, implied where no zero points are stored
NOT_FINITE: Final = "the weight holds NaN or infinity, all of it must be finite; repair the checkpoint"


class QuantizedWeight(NamedTuple):
    """Codes of a weight [out, in] and what maps them back.

    Attributes:
        codes: int8[out, in] for 8 bit, uint8[out, in] for 4 bit.
        scales: float32[out] per row, or [out, num_groups], bfloat16 or, with a codebook, float32; negative ones occur
            with `-sym`.
        zero_points: uint8[out, num_groups]; None if symmetric, which implies 0 for int8 and 8 for uint8 codes.
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


def quantize(weight: Tensor, scheme: QuantScheme, *, scale_dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Round a weight to nearest.

    Args:
        weight: float[out, in] of any float dtype; computed in float32.
        scale_dtype: float dtype to round the scales to, in place of the one above.

    Raises:
        QuantizationError: the weight is not 2-D, is empty, or holds NaN or infinity.
    """
    require_matrix(weight)
    dtype = scale_dtype or (torch.bfloat16 if scheme.group_size else torch.float32)
    parts = [_round_groups(grouped, scheme, dtype) for _, grouped in by_group(weight.float(), scheme.group_size)]
    codes = torch.cat([part.codes.flatten(1) for part in parts], 1)
    scales = torch.cat([part.scales for part in parts], 1)
    zero_points = (
        None if scheme.symmetric else torch.cat([p.zero_points for p in parts if p.zero_points is not None], 1)
    )
    refuse_nonfinite(scales)
    return QuantizedWeight(codes, scales if scheme.group_size else scales[:, 0], zero_points)


def dequantize(codes: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int) -> Tensor:
    """Map codes [out, in] back to float32 weights; products with bfloat16 scales are exact."""
    weight = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    scales = scales.float().view(len(codes), num_groups(codes.shape[1], group_size), 1)
    signed = codes.view(torch.int8)  # 0..15 is the same in both; torch converts from int8 several times faster
    for (groups, code), (_, product) in zip(by_group(signed, group_size), by_group(weight, group_size), strict=True):
        if zero_points is not None:
            code = code - zero_points[:, groups, None].view(torch.int8)
        elif codes.dtype == torch.uint8:
            code = code - SYMMETRIC_ZERO_POINT
        product.copy_(code).mul_(scales[:, groups])
    return weight


def by_group(matrix: Tensor, group_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Views [out, groups, weights] of the full groups, then of the short one if there is one, and which they are."""
    size = group_size or matrix.shape[1]
    full = matrix.shape[1] // size
    if full:
        yield slice(0, full), matrix[:, : full * size].view(len(matrix), full, size)
    if matrix.shape[1] % size:
        yield slice(full, full + 1), matrix[:, None, full * size :]


def _round_groups(weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Round float32[out, groups, weights]; codes have its shape, scales and zero points [out, groups]."""
    high, low = weight.amax(2, keepdim=True), weight.amin(2, keepdim=True)
    if not scheme.symmetric:
        low.clamp_(max=0)
        scales = high.clamp_(min=0) / 15 - low / 15  # high - low may overflow
    elif scheme.bits == 4:
        scales = torch.where(high >= -low, high, low) / -8
    else:
        scales = torch.maximum(high, -low) / 127
    scales = scales.to(scale_dtype)
    scales.masked_fill_(scales.abs() < torch.finfo(scale_dtype).tiny, 1)
    steps = weight.div(scales).round_()
    zero_points = None
    if scheme.bits == 4:
        offset = SYMMETRIC_ZERO_POINT if scheme.symmetric else low.div_(scales).round_().neg_().clamp_(0, 15)
        steps.add_(offset).clamp_(0, 15)
        zero_points = offset[:, :, 0].to(torch.uint8) if isinstance(offset, Tensor) else None
    codes = steps.to(torch.int8)
    return QuantizedWeight(codes if scheme.bits == 8 else codes.view(torch.uint8), scales[:, :, 0], zero_points)
