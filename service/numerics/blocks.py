"""The simple formats of GGUF: 32 neighbours of a row share a float16 scale d, and with `_1` a float16 offset m.

    format      d before rounding to float16    codes                                       w'
    q8_0        max|w| / 127                    round(w / d), half away from zero           d code
    q4_0        signed max / -8                 trunc(w / d + 8.5), at most 15              d (code - 8)
    q5_0        signed max / -16                trunc(w / d + 16.5), at most 31             d (code - 16)
    q4_1        (max - min) / 15                trunc((w - m) / d + 0.5), m = min           d code + m
    q5_1        (max - min) / 31                as q4_1                                     d code + m

Codes are chosen against d and m before these are rounded, by products with the float32 reciprocal of d. Codes and
scales are those of llama.cpp, in another order in memory. Blocks whose d is below the smallest normal float,
2^-126, are zeros, or m; the last block of a row may be short.

Source: ggml/src/ggml-quants.c of llama.cpp, `quantize_row_*_ref`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from service.errors import QuantizationError
from service.numerics.affine import QuantizedWeight, bounds_of, by_group, centre, refuse_nonfinite, to_codes
from service.numerics.schemes import QuantScheme

_ALMOST_HALF: Final = 0.5 - 2**-25
"""The float32 below 1/2: added to one below 1/2 it stays below 1, and 1/2 itself is rounded up to 1."""


def quantize_blocks(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Round float32[out, in], not empty.

    Returns:
        Codes, and float16 scales [out, blocks], or of `_1` scales and offsets in turns.

    Raises:
        QuantizationError: the weight holds NaN or infinity, or is too large for float16 scales.
    """
    parts = [_round_blocks(grouped, scheme) for _, grouped in by_group(weight, scheme.group_size)]
    scales = torch.cat([part.scales for part in parts], 1)
    refuse_nonfinite(scales)
    stored = scales.half()
    if not stored.isfinite().all():
        raise QuantizationError(
            f"the weight is up to {float(weight.abs().max()):.3g} large, which the float16 scales of {scheme.name} "
            "cannot hold; use w8a16 or w4a16 there"
        )
    return QuantizedWeight(torch.cat([part.codes for part in parts], 1), stored, None)


def _round_blocks(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Codes and float32 scales of float32[out, blocks, weights]."""
    low, high = bounds_of(weight)
    steps_of_range = (1 << scheme.bits) - 1
    if scheme.offset == "float":
        scales = (high - low) / steps_of_range
    elif scheme.bits == 8:
        scales = torch.maximum(high, -low) / 127
    else:
        scales = _signed_peaks(weight, low, high) / -centre(scheme)
    inverses = scales.reciprocal().masked_fill_(scales.abs() < torch.finfo(torch.float32).tiny, 0)
    if scheme.offset == "float":
        codes = to_codes((weight - low).mul_(inverses).add_(0.5).trunc_(), scheme)
        return QuantizedWeight(codes, torch.stack((scales, low), 2).flatten(1), None)
    steps = weight * inverses
    if scheme.bits == 8:  # half away from zero
        steps = torch.copysign(steps.abs().add_(_ALMOST_HALF).trunc_(), steps)
    else:
        steps.add_(centre(scheme) + 0.5).trunc_()
    return QuantizedWeight(to_codes(steps, scheme), scales.flatten(1), None)


def _signed_peaks(weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The first of the largest magnitudes of each block, with its sign."""
    is_tied = high == -low
    if not is_tied.any():
        return torch.where(high > -low, high, low)
    first = weight.abs().argmax(2, keepdim=True)
    return torch.where(is_tied, weight.gather(2, first), torch.where(high > -low, high, low))
