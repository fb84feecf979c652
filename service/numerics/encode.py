"""From a weight to the buffers of a layer and back, in chunks of rows.

Buffers of a weight [out, in], G groups per row:

    scheme          qweight                     scales                  zero_points
    w8a16           int8[out, in]               float32[out]
    w8a16-gN        int8[out, in]               bfloat16[out, G]
    w4a16-gN        uint8[out, padded / 2]      bfloat16[out, G]        uint8[out, ceil(G / 2)]
    w4a16-gN-sym    uint8[out, padded / 2]      bfloat16[out, G]

with `padded` and the order of nibbles as in `packing`.
"""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from service.numerics.affine import dequantize, num_groups, quantize, require_matrix
from service.numerics.packing import pack_bits, padded_width, unpack_bits
from service.numerics.schemes import QuantScheme

CHUNK_WEIGHTS: Final = 512 * 1024  # 2 MiB of float32 stay in the caches of two cores


class EncodedWeight(NamedTuple):
    """The buffers of one weight and what encoding cost.

    Attributes:
        qweight, scales, zero_points: as drawn above.
        signal: sum of w**2.
        noise: sum of (w - w')**2.
        quantize_s, pack_s: seconds spent in rounding (error sums included) and in packing.
    """

    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None
    signal: float
    noise: float
    quantize_s: float
    pack_s: float


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self) -> Tensor:
        """Such a tensor, uninitialised, on the current default device."""
        return torch.empty(self.shape, dtype=self.dtype)


class StorageShapes(NamedTuple):
    """The buffers of one weight before they exist; `zero_points` is None if symmetric."""

    qweight: TensorSpec
    scales: TensorSpec
    zero_points: TensorSpec | None

    @property
    def codes_bytes(self) -> int:
        """Bytes of the codes, padding included."""
        return self.qweight.num_bytes

    @property
    def scales_bytes(self) -> int:
        """Bytes of scales and zero points."""
        return self.scales.num_bytes + (self.zero_points.num_bytes if self.zero_points else 0)


def storage_shapes(out_features: int, in_features: int, scheme: QuantScheme) -> StorageShapes:
    """What `encode` makes of a weight of this size."""
    groups = num_groups(in_features, scheme.group_size)
    if scheme.bits == 8:
        qweight = TensorSpec((out_features, in_features), torch.int8)
    else:
        qweight = TensorSpec((out_features, padded_width(in_features) // 2), torch.uint8)
    if scheme.group_size:
        scales = TensorSpec((out_features, groups), torch.bfloat16)
    else:
        scales = TensorSpec((out_features,), torch.float32)
    zero_points = None if scheme.symmetric else TensorSpec((out_features, -(-groups // 2)), torch.uint8)
    return StorageShapes(qweight, scales, zero_points)


def encode(weight: Tensor, scheme: QuantScheme, *, chunk_weights: int = CHUNK_WEIGHTS) -> EncodedWeight:
    """Quantize and pack a weight; no float32 copy of the whole of it is ever made.

    Args:
        weight: float[out, in] on the CPU, finite, of any strides.
        chunk_weights: how many are rounded at a time, in whole rows; at least one row.

    Returns:
        Buffers that are the same for any number of threads.

    Raises:
        QuantizationError: the weight is not 2-D, is empty, or holds NaN or infinity.
    """
    require_matrix(weight)
    out_features, in_features = weight.shape
    shapes = storage_shapes(out_features, in_features, scheme)
    qweight, scales = shapes.qweight.empty(), shapes.scales.empty()
    zero_points = shapes.zero_points.empty() if shapes.zero_points else None
    signal = noise = quantize_s = pack_s = 0.0
    num_rows = max(1, chunk_weights // in_features)
    for first in range(0, out_features, num_rows):
        rows = slice(first, first + num_rows)
        started = time.perf_counter()
        chunk = weight[rows].to(torch.float32, memory_format=torch.contiguous_format)
        codes, scales[rows], chunk_zero_points = quantize(chunk, scheme)
        decoded = dequantize(codes, scales[rows], chunk_zero_points, scheme.group_size)
        signal += _sum_of_squares(chunk)
        noise += _sum_of_squares(decoded.sub_(chunk))
        quantized = time.perf_counter()
        qweight[rows] = codes if scheme.bits == 8 else _pack_rows(codes)
        if zero_points is not None and chunk_zero_points is not None:
            zero_points[rows] = pack_bits(chunk_zero_points, 4)
        quantize_s += quantized - started
        pack_s += time.perf_counter() - quantized
    return EncodedWeight(qweight, scales, zero_points, signal, noise, quantize_s, pack_s)


def decode(
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    scheme: QuantScheme,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Map the buffers of `encode`, or some of their rows, back to weights [rows, in] of `dtype`.

    Args:
        dtype: one in which the scales are exact: float32, or for bfloat16 scales also bfloat16.
    """
    codes = qweight if scheme.bits == 8 else unpack_bits(qweight, 4)[:, :in_features]
    if zero_points is not None:
        zero_points = unpack_bits(zero_points, 4)[:, : scales.shape[1]]
    return dequantize(codes, scales, zero_points, scheme.group_size, dtype=dtype)


def _pack_rows(codes: Tensor) -> Tensor:
    """Pack 4-bit codes, padded to the tile."""
    in_features = codes.shape[1]
    return pack_bits(functional.pad(codes, (0, padded_width(in_features) - in_features)), 4)


def _sum_of_squares(values: Tensor) -> float:
    """Sum of squares; in float64 where float32 would over- or underflow."""
    total = float(torch.linalg.vector_norm(values, dim=1).square_().sum(dtype=torch.float64))
    if 1e-20 < total < float("inf"):
        return total
    return float(values.double().square_().sum())
