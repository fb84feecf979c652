"""NF4 with 8-bit scales: `nf4-dq`, the double quantization of QLoRA.

Scales of groups, positive, are rounded a second time: scale ~ mean + level[code] * peak. The mean is that of the scales
of the whole tensor, and a peak the largest |scale - mean| of 256 neighbours, which are taken row by row of a strip,
beginning anew with each strip. The 256 levels are 8-bit floats with an exponent of varying length: for i = 0..6, the
2^i midpoints between 2^i + 1 points from 0.1 to 1, times 10^(i - 6), and their negatives; 0; and 1.

Buffer of a strip with G groups per row and P = ceil(G / 16) peaks: uint8[G + ceil((P + 1) / 4), 16], codes as other
scales lie, then the float32 mean and peaks, then zeros.

Sources: arXiv:2305.14314 (QLoRA) 3, arXiv:1511.04561, bitsandbytes 0.50 (`create_dynamic_map`).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from service.numerics.packing import STRIP, from_strips

_NEIGHBOURS: Final = 256


def num_rows(num_groups: int) -> int:
    """Rows of 16 bytes in the buffer of a strip."""
    return num_groups + -(-4 * (1 + _num_peaks(num_groups)) // STRIP)


def compress(scales: Tensor, out_features: int) -> Tensor:
    """Round the scales float32[S, G, 16] of a whole tensor to uint8[S, num_rows, 16]."""
    strips, groups, _ = scales.shape
    by_row = from_strips(scales)
    mean = by_row[:out_features].mean(dtype=torch.float64).float()
    distances = by_row - mean
    distances[out_features:] = 0
    flat = functional.pad(distances.reshape(strips, -1), (0, _num_peaks(groups) * _NEIGHBOURS - STRIP * groups))
    blocks = flat.view(strips, -1, _NEIGHBOURS)
    peaks = blocks.abs().amax(2)
    normed = blocks * peaks.masked_fill(peaks == 0, 1).reciprocal()[..., None]
    table = levels(scales.device)
    codes = torch.bucketize(normed, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    buffer = torch.empty(strips, num_rows(groups), STRIP, dtype=torch.uint8, device=scales.device)
    buffer[:, :groups] = codes.view(strips, -1)[:, : STRIP * groups].view(strips, STRIP, groups).transpose(1, 2)
    floats = torch.cat((mean.expand(strips, 1), peaks), 1).view(torch.uint8)
    tail = functional.pad(floats, (0, -floats.shape[1] % STRIP))
    buffer[:, groups:] = tail.view(strips, -1, STRIP)
    return buffer


def expand(buffer: Tensor, num_groups: int) -> Tensor:
    """Undo `compress`, for all strips or some: float32[S, G, 16]."""
    tail = buffer[:, num_groups:].flatten(1)[:, : 4 * (1 + _num_peaks(num_groups))].contiguous().view(torch.float32)
    output = torch.arange(STRIP, device=buffer.device)
    group = torch.arange(num_groups, device=buffer.device)[:, None]
    peaks = tail[:, 1 + (output * num_groups + group) // _NEIGHBOURS]
    table = levels(buffer.device)
    return table[buffer[:, :num_groups].int()].mul_(peaks).add_(tail[:, :1, None])


@cache
def levels(device: torch.device | None = None) -> Tensor:
    """What codes of scales stand for, rising: float32[256]; do not write to it."""
    positive = [torch.tensor([1.0])]
    for i in range(7):
        points = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        positive.append((points[:-1] + points[1:]) / 2 * 10 ** (i - 6))
    table = torch.cat((*positive, *(-part for part in positive[1:]), torch.tensor([0.0])))
    return table.sort().values.to(device or "cpu")


def _num_peaks(num_groups: int) -> int:
    return -(-STRIP * num_groups // _NEIGHBOURS)
