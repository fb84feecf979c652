"""Weights as 8-bit floats with one float32 scale per row: `w ~ float(code) * scale`.

A code is a float8_e4m3fn: sign, 4 bits of exponent, 3 of mantissa, up to 448, no infinity. The scale is the largest
magnitude of the row / 448, so that |w - w'| is at most |w| / 16, and 2^-10 scale where the code is subnormal. A row
so small that its scale would be below the smallest normal float, 2^-126, is stored as zeros with scale 1.

Source: arXiv:2209.05433.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from service.numerics.affine import QuantizedWeight, refuse_nonfinite, require_matrix

_LARGEST: Final = 448.0  # of float8_e4m3fn


def quantize_to_float8(weight: Tensor) -> QuantizedWeight:
    """Round a weight to the nearest 8-bit floats, ties to even.

    Args:
        weight: float[out, in] of any float dtype; computed in float32.

    Returns:
        Codes as int8, the bits of float8_e4m3fn, and float32[out, 1] scales.

    Raises:
        QuantizationError: the weight is not 2-D, is empty, or holds NaN or infinity.
    """
    require_matrix(weight)
    weight = weight.float()
    scales = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True)) / _LARGEST
    refuse_nonfinite(scales)
    is_tiny = scales < torch.finfo(torch.float32).tiny
    steps = weight.div(scales.masked_fill_(is_tiny, 1)).clamp_(-_LARGEST, _LARGEST)
    codes = steps.masked_fill_(is_tiny, 0).to(torch.float8_e4m3fn).view(torch.int8)
    return QuantizedWeight(codes, scales, None)


def levels_of(codes: Tensor) -> Tensor:
    """What codes int8[...] stand for, before scales: float8_e4m3fn, exact in bfloat16 and wider."""
    return codes.view(torch.float8_e4m3fn)
