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
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if scheme.group_size:
        y = reference.linear_packed(rows, qweight, scales, zero_points, scheme=scheme, bias=bias)
    elif _suits_int8_operator(rows):
        y = reference.linear_w8a16_few_rows(rows, qweight, scales, bias)
    else:
        y = reference.linear_w8a16(rows, qweight, scales, bias)
    return y.view(*x.shape[:-1], len(qweight))


def _suits_int8_operator(x: Tensor) -> bool:
    """A few bfloat16 rows on the CPU, of a width that torch's int8 operator reads correctly."""
    num_rows, in_features = x.shape
    is_bfloat16_on_cpu = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return is_bfloat16_on_cpu and 1 <= num_rows <= FEW_ROWS and in_features % 32 == 0
