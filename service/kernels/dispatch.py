"""The one place that picks a kernel."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from service.kernels import reference
from service.numerics.schemes import QuantScheme

KERNEL: Final = "torch"  # the kernels in use, for the report and the metric label
FEW_ROWS: Final = 4


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    scheme: QuantScheme,
    bias: Tensor | None,
) -> Tensor:
    """Compute x @ W.T + bias with the buffers of `numerics.encode`.

    Args:
        x: float[..., in].
        bias: float[out] or None.

    Returns:
        float[..., out] of x's dtype.
    """
    if scheme.group_size:
        return reference.linear_packed(x, qweight, scales, zero_points, scheme=scheme, bias=bias)
    if _suits_int8_operator(x):
        return reference.linear_w8a16_few_rows(x, qweight, scales, bias)
    return reference.linear_w8a16(x, qweight, scales, bias)


def _suits_int8_operator(x: Tensor) -> bool:
    """A few bfloat16 rows on the CPU, of a width that torch's int8 operator reads correctly."""
    in_features = x.shape[-1]
    few = x.numel() <= FEW_ROWS * in_features
    return few and x.dtype == torch.bfloat16 and x.device.type == "cpu" and in_features % 32 == 0
