"""Products of activations with packed weights from torch operators alone: the oracle, and the fallback everywhere.

Weights are decoded in blocks of strips that stay in a cache, and each block is multiplied by `linear` of torch.
float16 activations are computed in float32: sums of products with codes reach 127 times the sums of weights,
beyond 65504, and bfloat16 scales are not exact in float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from service.numerics.encode import decode
from service.numerics.float8 import levels_of
from service.numerics.packing import STRIP, unpack_tiles
from service.numerics.schemes import QuantScheme

CPU_BLOCK_BYTES: Final = 2 << 20  # of decoded weights; about the L2 of two cores, measured best of 1/4 to 4 MiB
DEVICE_BLOCK_BYTES: Final = 64 << 20  # enough rows to fill a large GPU


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    scheme: QuantScheme,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Compute x @ W.T + bias for any scheme; see the two below."""
    if scheme.bits == 8 and not scheme.group_size and scheme.offset == "sym":
        return linear_by_row(x, qweight, scales, bias, scheme=scheme, out_features=out_features)
    return linear_packed(x, qweight, scales, zero_points, scheme=scheme, out_features=out_features, bias=bias)


def linear_by_row(
    x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, *, scheme: QuantScheme, out_features: int
) -> Tensor:
    """Compute x @ W.T + bias for 8-bit codes and one scale per row.

    Integers and 8-bit floats are exact in every activation dtype; the scales multiply the sums in float32, once.

    Args:
        x: float[rows, in], contiguous.
        qweight, scales: as `numerics.encode` makes them.
        bias: float[out] or None.

    Returns:
        float[rows, out] of x's dtype.
    """
    rows, y = _operand(x), x.new_empty(len(x), out_features)
    for strips, outputs in _blocks(qweight, out_features, x.shape[1] * rows.itemsize):
        codes = unpack_tiles(qweight[strips], 8)[: outputs.stop - outputs.start, : x.shape[1]]
        levels = levels_of(codes) if scheme.named == "fp8" else codes
        sums = functional.linear(rows, levels.to(rows.dtype))
        product = sums * scales[outputs]  # float32, to which bfloat16 sums are promoted
        y[:, outputs] = product if bias is None else product.add_(bias[outputs])
    return y


def linear_packed(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    scheme: QuantScheme,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Compute x @ W.T + bias; decoded weights are rounded to x's dtype.

    Args:
        x: float[rows, in], contiguous.
        qweight, scales, zero_points: as `numerics.encode` makes them.
        bias: float[out] or None.

    Returns:
        float[rows, out] of x's dtype.
    """
    rows, y = _operand(x), x.new_empty(len(x), out_features)
    scales = scales if scales.dim() == 3 else scales.view(-1, STRIP)
    for strips, outputs in _blocks(qweight, out_features, x.shape[1] * torch.float32.itemsize):
        weight = decode(
            qweight[strips],
            scales[strips],
            None if zero_points is None else zero_points[strips],
            scheme=scheme,
            out_features=outputs.stop - outputs.start,
            in_features=x.shape[1],
        )
        y[:, outputs] = functional.linear(
            rows, weight.to(rows.dtype), None if bias is None else bias[outputs].to(rows.dtype)
        )
    return y


def _operand(x: Tensor) -> Tensor:
    """Activations in the dtype to compute in."""
    return x.float() if x.dtype == torch.float16 else x


def _blocks(qweight: Tensor, out_features: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Runs of strips that fill a block when decoded to `row_bytes` for each output, and the outputs in them."""
    block_bytes = CPU_BLOCK_BYTES if qweight.device.type == "cpu" else DEVICE_BLOCK_BYTES
    num_strips = max(1, block_bytes // (STRIP * row_bytes))
    for first in range(0, len(qweight), num_strips):
        last = first + num_strips
        yield slice(first, last), slice(first * STRIP, min(last * STRIP, out_features))
