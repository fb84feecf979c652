"""Products of activations with packed weights from torch operators alone: the oracle, and the fallback everywhere.

Weights are decoded in blocks of output rows that stay in a cache, and each block is multiplied by `linear` of torch.
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
from service.numerics.schemes import QuantScheme

CPU_BLOCK_BYTES: Final = 2 << 20  # of decoded weights; about the L2 of two cores, measured best of 1/4 to 4 MiB
DEVICE_BLOCK_BYTES: Final = 64 << 20  # enough rows to fill a large GPU


def linear_w8a16(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x @ W.T + bias for one scale per row.

    Integers are exact in every activation dtype; the scales multiply the sums in float32, once.

    Args:
        x: float[rows, in], contiguous.
        qweight: int8[out, in].
        scales: float32[out].
        bias: float[out] or None.

    Returns:
        float[rows, out] of x's dtype.
    """
    rows, y = _operand(x), x.new_empty(len(x), len(qweight))
    for block in _blocks(qweight, x.shape[1] * rows.itemsize):
        sums = functional.linear(rows, qweight[block].to(rows.dtype))
        y[:, block] = _scaled(sums, scales[block], None if bias is None else bias[block])
    return y


def linear_w8a16_few_rows(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """The same for a few bfloat16 rows on the CPU: torch's int8 operator reads each code once, undecoded.

    It takes scales in the dtype of x only; it gets ones, and the float32 scales multiply its sums.
    `in` must be a multiple of 32: at others the operator returns wrong sums or crashes (torch 2.13).
    """
    ones = torch.ones(len(qweight), dtype=x.dtype)
    sums = torch._weight_int8pack_mm(x, qweight, ones)
    return _scaled(sums, scales, bias).to(x.dtype)


def linear_packed(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    scheme: QuantScheme,
    bias: Tensor | None,
) -> Tensor:
    """Compute x @ W.T + bias for one scale per group; decoded weights are rounded to x's dtype.

    Args:
        x: float[rows, in], contiguous.
        qweight, scales, zero_points: as `numerics.encode` makes them.
        bias: float[out] or None.

    Returns:
        float[rows, out] of x's dtype.
    """
    rows, y = _operand(x), x.new_empty(len(x), len(qweight))
    for block in _blocks(qweight, x.shape[1] * torch.float32.itemsize):
        weight = decode(
            qweight[block],
            scales[block],
            None if zero_points is None else zero_points[block],
            scheme=scheme,
            in_features=x.shape[1],
        )
        y[:, block] = functional.linear(
            rows, weight.to(rows.dtype), None if bias is None else bias[block].to(rows.dtype)
        )
    return y


def _operand(x: Tensor) -> Tensor:
    """Activations in the dtype to compute in."""
    return x.float() if x.dtype == torch.float16 else x


def _blocks(qweight: Tensor, row_bytes: int) -> Iterator[slice]:
    """Runs of output rows, decoded to `row_bytes` each, that fill a block."""
    num_rows = max(1, (CPU_BLOCK_BYTES if qweight.device.type == "cpu" else DEVICE_BLOCK_BYTES) // row_bytes)
    for first in range(0, len(qweight), num_rows):
        yield slice(first, first + num_rows)


def _scaled(sums: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Sums of products with codes to float32 results."""
    product = sums * scales  # float32, to which bfloat16 sums are promoted
    return product if bias is None else product.add_(bias)
