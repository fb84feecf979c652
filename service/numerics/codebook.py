"""Tables of 16 levels that 4-bit codes stand for: `w ~ levels[code] * scale`.

NF4 and FP4 take 64 weights of a row at a time; their scale is the largest magnitude among them, float32. The code is
that of the level nearest to w / scale, chosen as bitsandbytes chooses it on the CPU, in float32 throughout:

    r = 1 / scale,  v = w * r,  code = order[number of thresholds below v]

`order` are the codes by rising level, and the thresholds are the midpoints of neighbouring levels, (a + b) / 2; on a
threshold the lower level wins. FP4 has two codes for 0: 0 where v <= 0, and 8 above. A group whose largest magnitude
is below the smallest normal float, 2^-126, is stored as zeros with scale 1; r of the largest floats is subnormal and
must not be flushed to 0.

    table   widest gap between levels                   |w - w'| at most, up to float32 rounding
    nf4     1 - 0.6962, at the negative end             0.1519 scale
    fp4     1/3, from 8/12 to 12/12                     scale / 6

Sources: arXiv:2305.14314 (QLoRA), bitsandbytes 0.50 (`create_normal_map`, `get_4bit_type`, `quantize_4bit`).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from service.numerics.affine import (
    QuantizedWeight,
    by_group,
    centre,
    num_groups,
    refuse_nonfinite,
    require_matrix,
)
from service.numerics.schemes import QuantScheme

_NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4: Final = tuple(sign * twelfths / 12 for sign in (1, -1) for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))
_ORDER: Final = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}


@cache
def levels(scheme: QuantScheme, device: torch.device | None = None) -> Tensor:
    """What the codes of a 4-bit scheme stand for, before zero points and scales: float32[16]; do not write to it."""
    integers = range(-centre(scheme), 16 - centre(scheme))
    table = {"nf4": _NF4, "fp4": _FP4}.get(scheme.codebook, integers)
    return torch.tensor(table, dtype=torch.float32, device=device or "cpu")


def thresholds(scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Float32[15] thresholds, rising, and uint8[16] codes by rising level, of a scheme with a codebook."""
    order = torch.tensor(_ORDER[scheme.codebook], device="cpu")
    rising = levels(scheme)[order]
    return (rising[:-1] + rising[1:]) / 2, order.to(torch.uint8)


def quantize_to_levels(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Round a weight to the nearest levels of a codebook.

    Args:
        weight: float[out, in] of any float dtype; computed in float32.

    Returns:
        uint8 codes, float32[out, num_groups] scales, no zero points.

    Raises:
        QuantizationError: the weight is not 2-D, is empty, or holds NaN or infinity.
    """
    require_matrix(weight)
    weight = weight.float()
    scales = weight.new_empty(len(weight), num_groups(weight.shape[1], scheme.group_size))
    scaled = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for (groups, group), (_, product) in zip(
        by_group(weight, scheme.group_size), by_group(scaled, scheme.group_size), strict=True
    ):
        largest = torch.maximum(group.amax(2), group.amin(2).neg_())
        is_tiny = largest < torch.finfo(torch.float32).tiny
        scales[:, groups] = largest.masked_fill_(is_tiny, 1)
        torch.mul(group, largest.reciprocal().masked_fill_(is_tiny, 0)[..., None], out=product)
    refuse_nonfinite(scales)
    return QuantizedWeight(_nearest(scaled, scheme), scales, None)


def dequantize_levels(codes: Tensor, scales: Tensor, scheme: QuantScheme) -> Tensor:
    """Map codes [out, in] of a codebook back to float32 weights; each is one product, rounded once."""
    table = levels(scheme, codes.device)
    weight = table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
    for groups, product in by_group(weight, scheme.group_size):
        product.mul_(scales[:, groups, None])
    return weight


def _nearest(scaled: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes of the nearest levels.

    Comparisons with a result in float32 are vectorised; `torch.bucketize` takes three times as long.
    """
    bounds, order = thresholds(scheme)
    codes = torch.full_like(scaled, float(order[0]))
    is_above = torch.empty_like(scaled)
    for bound, step in zip(bounds.tolist(), order.int().diff().tolist(), strict=True):
        codes.add_(torch.gt(scaled, bound, out=is_above), alpha=step)
    return codes.to(torch.int8).view(torch.uint8)
