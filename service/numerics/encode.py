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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from service.numerics.affine import dequantize, num_groups, quantize, require_matrix
from service.numerics.packing import pack_bits, padded_width, unpack_bits
from service.numerics.schemes import QuantScheme

CHUNK_WEIGHTS: Final = 240 * 1024
"""Weights rounded at a time by one thread. In float32 they stay below 1 MiB, where a heap keeps freed blocks."""


class EncodedWeight(NamedTuple):
    """The buffers of one weight and what encoding cost.

    Attributes:
        qweight, scales, zero_points: as drawn above.
        signal: sum of w**2.
        noise: sum of (w - w')**2.
        quantize_s, pack_s: wall seconds spent in rounding (error sums included) and in packing.
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

    def empty(self, device: torch.device | None = None) -> Tensor:
        """Such a tensor, uninitialised; no device: on the current default one."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


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
    qweight, scales = shapes.qweight.empty(weight.device), shapes.scales.empty(weight.device)
    zero_points = shapes.zero_points.empty(weight.device) if shapes.zero_points else None
    num_rows = max(1, chunk_weights // in_features)

    def encode_rows(first: int) -> _RowFigures:
        rows = slice(first, first + num_rows)
        started = time.perf_counter()
        chunk = weight[rows].to(torch.float32, memory_format=torch.contiguous_format)
        codes, scales[rows], chunk_zero_points = quantize(chunk, scheme)
        decoded = dequantize(codes, scales[rows], chunk_zero_points, scheme.group_size)
        signal, noise = _sum_of_squares(chunk), _sum_of_squares(decoded.sub_(chunk))
        quantized = time.perf_counter()
        qweight[rows] = codes if scheme.bits == 8 else _pack_rows(codes)
        if zero_points is not None and chunk_zero_points is not None:
            zero_points[rows] = pack_bits(chunk_zero_points, 4)
        return _RowFigures(signal, noise, quantized - started, time.perf_counter() - quantized)

    started = time.perf_counter()
    figures = _in_threads(encode_rows, range(0, out_features, num_rows))
    wall_s = time.perf_counter() - started
    quantize_s, pack_s = sum(f.quantize_s for f in figures), sum(f.pack_s for f in figures)
    pack_share = pack_s / (quantize_s + pack_s)
    return EncodedWeight(
        qweight,
        scales,
        zero_points,
        signal=sum(f.signal for f in figures),
        noise=sum(f.noise for f in figures),
        quantize_s=wall_s * (1 - pack_share),
        pack_s=wall_s * pack_share,
    )


class _RowFigures(NamedTuple):
    """Error sums of some rows, and seconds of the thread that encoded them."""

    signal: float
    noise: float
    quantize_s: float
    pack_s: float


def _in_threads(encode_rows: Callable[[int], _RowFigures], firsts: range) -> list[_RowFigures]:
    """Call `encode_rows` with each of `firsts` on as many threads as torch uses here, in order of the results.

    Threads with one chunk each do not wait for one another. With torch's own threads, which meet after every
    operation, a machine that has other work took up to 40 times as long (2026-11-21, two cores).
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(firsts) == 1:
        return list(map(encode_rows, firsts))
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        figures = list(pool.map(encode_rows, firsts))
    torch.set_num_threads(num_threads)  # threads to come take the count that was set last, on any thread
    return figures


def decode(
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    scheme: QuantScheme,
    in_features: int,
) -> Tensor:
    """Map the buffers of `encode`, or some of their rows, back to weights: float32[rows, in]."""
    codes = qweight if scheme.bits == 8 else unpack_bits(qweight, 4)[:, :in_features]
    if zero_points is not None:
        zero_points = unpack_bits(zero_points, 4)[:, : scales.shape[1]]
    return dequantize(codes, scales, zero_points, scheme.group_size)


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
