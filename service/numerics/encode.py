"""From a weight to the buffers of a layer and back, in chunks of strips.

Buffers of a weight [out, in], with S strips of T tiles as drawn in `packing`, and G groups per row:

    scheme          qweight                 scales                  zero_points
    w8a16           int8[S, T * 512]        float32[S * 16]
    w8a16-gN        int8[S, T * 512]        bfloat16[S, G, 16]
    w4a16-gN        uint8[S, T * 256]       bfloat16[S, G, 16]      uint8[S, G, 8]
    w4a16-gN-sym    uint8[S, T * 256]       bfloat16[S, G, 16]
    nf4, fp4        uint8[S, T * 256]       float32[S, G, 16]

Outputs that only pad the last strip have codes and zero points 0 and scales 1; padded columns have codes 0. Readers
let neither meet an activation, nor keep such a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import torch
from torch import Tensor

from service.numerics.affine import QuantizedWeight, dequantize, num_groups, quantize, require_matrix
from service.numerics.codebook import dequantize_levels, quantize_to_levels
from service.numerics.packing import (
    K_TILE,
    STRIP,
    from_strips,
    num_strips,
    num_tiles,
    pack_nibbles,
    pack_tiles,
    to_strips,
    unpack_nibbles,
    unpack_rows,
    unpack_tiles,
)
from service.numerics.schemes import QuantScheme

CHUNK_WEIGHTS: Final = 240 * 1024
"""Weights rounded at a time by one thread. In float32 they stay below 1 MiB, where a heap keeps freed blocks."""


class EncodedWeight(NamedTuple):
    """The buffers of one weight and what encoding cost.

    Attributes:
        qweight, scales, zero_points: as drawn above.
        signal: sum of w**2.
        noise: sum of (w - w')**2.
        quantize_s, pack_s: wall seconds spent in rounding (error sums included) and in packing; a native encoder does
            both in one pass, all of which is quantize_s.
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
    strips, groups = num_strips(out_features), num_groups(in_features, scheme.group_size)
    code_dtype = torch.int8 if scheme.bits == 8 else torch.uint8
    qweight = TensorSpec((strips, num_tiles(in_features) * K_TILE * STRIP * scheme.bits // 8), code_dtype)
    shape = (strips, groups, STRIP) if scheme.group_size else (strips * STRIP,)
    has_wide_scales = scheme.codebook or not scheme.group_size
    scales = TensorSpec(shape, torch.float32 if has_wide_scales else torch.bfloat16)
    zero_points = None if scheme.symmetric else TensorSpec((strips, groups, STRIP // 2), torch.uint8)
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
    strips_per_chunk = max(1, chunk_weights // (STRIP * in_features))

    def encode_strips(first: int) -> _ChunkFigures:
        strips = slice(first, first + strips_per_chunk)
        started = time.perf_counter()
        rows = weight[strips.start * STRIP : strips.stop * STRIP]
        rounded, signal, noise = _round(rows, scheme, max_rows=max(1, chunk_weights // in_features))
        quantized = time.perf_counter()
        qweight[strips] = pack_tiles(rounded.codes, scheme.bits)
        _by_strip(scales)[strips] = to_strips(rounded.scales)
        if zero_points is not None and rounded.zero_points is not None:
            zero_points[strips] = pack_nibbles(to_strips(rounded.zero_points))
        return _ChunkFigures(signal, noise, quantized - started, time.perf_counter() - quantized)

    started = time.perf_counter()
    figures = _in_threads(encode_strips, range(0, len(qweight), strips_per_chunk))
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


def _round(rows: Tensor, scheme: QuantScheme, *, max_rows: int) -> tuple[QuantizedWeight, float, float]:
    """Quantize the rows of some strips, `max_rows` at a time: padded codes, scales and zero points, signal, noise."""
    num_rows, in_features = rows.shape
    outputs, groups = num_strips(num_rows) * STRIP, num_groups(in_features, scheme.group_size)
    shapes = storage_shapes(num_rows, in_features, scheme)
    codes = rows.new_zeros(outputs, num_tiles(in_features) * K_TILE, dtype=shapes.qweight.dtype)
    scales = rows.new_ones(outputs, groups, dtype=shapes.scales.dtype)
    zero_points = None if scheme.symmetric else rows.new_zeros(outputs, groups, dtype=torch.uint8)
    signal = noise = 0.0
    for first in range(0, num_rows, max_rows):
        part = slice(first, min(first + max_rows, num_rows))
        chunk = rows[part].to(torch.float32, memory_format=torch.contiguous_format)
        rounded = quantize_to_levels(chunk, scheme) if scheme.codebook else quantize(chunk, scheme)
        codes[part, :in_features] = rounded.codes
        scales[part] = rounded.scales.view(len(chunk), groups)
        if zero_points is not None and rounded.zero_points is not None:
            zero_points[part] = rounded.zero_points
        signal += _sum_of_squares(chunk)
        noise += _sum_of_squares(_weights(rounded, scheme).sub_(chunk))
    return QuantizedWeight(codes, scales, zero_points), signal, noise


class _ChunkFigures(NamedTuple):
    """Error sums of some strips, and seconds of the thread that encoded them."""

    signal: float
    noise: float
    quantize_s: float
    pack_s: float


def _in_threads(encode_strips: Callable[[int], _ChunkFigures], firsts: range) -> list[_ChunkFigures]:
    """Call `encode_strips` with each of `firsts` on as many threads as torch uses here, in order of the results.

    Threads with one chunk each do not wait for one another. With torch's own threads, which meet after every
    operation, a machine that has other work took up to 40 times as long (2026-11-21, two cores).
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(firsts) == 1:
        return list(map(encode_strips, firsts))
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        figures = list(pool.map(encode_strips, firsts))
    torch.set_num_threads(num_threads)  # threads to come take the count that was set last, on any thread
    return figures


def decode(
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    scheme: QuantScheme,
    out_features: int,
    in_features: int,
) -> Tensor:
    """Map the buffers of `encode` back to weights: float32[out, in].

    Those of a run of strips are the buffers of its outputs, and are decoded as such.
    """
    codes = unpack_tiles(qweight, scheme.bits)[:out_features, :in_features]
    points = None if zero_points is None else from_strips(unpack_nibbles(zero_points))[:out_features]
    return _weights(QuantizedWeight(codes, from_strips(_by_strip(scales))[:out_features], points), scheme)


def decode_rows(
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    rows: Tensor,
    *,
    scheme: QuantScheme,
    in_features: int,
) -> Tensor:
    """Map some rows back to weights without a look at others: int[n], each below `out`, to float32[n, in]."""
    strip, output = rows // STRIP, rows % STRIP
    codes = unpack_rows(qweight, rows, scheme.bits)[:, :in_features]
    points = None
    if zero_points is not None:
        shift = (output % 2 * 4).to(torch.uint8)[:, None]
        points = zero_points[strip, :, output // 2] >> shift & 15
    return _weights(QuantizedWeight(codes, _by_strip(scales)[strip, :, output], points), scheme)


def _by_strip(scales: Tensor) -> Tensor:
    """Scales of rows as those of one group: [S, G, 16]."""
    return scales if scales.dim() == 3 else scales.view(-1, 1, STRIP)


def _weights(quantized: QuantizedWeight, scheme: QuantScheme) -> Tensor:
    if scheme.codebook:
        return dequantize_levels(quantized.codes, quantized.scales, scheme)
    return dequantize(*quantized, scheme.group_size)


def _sum_of_squares(values: Tensor) -> float:
    """Sum of squares; in float64 where float32 would over- or underflow."""
    total = float(torch.linalg.vector_norm(values, dim=1).square_().sum(dtype=torch.float64))
    if 1e-20 < total < float("inf"):
        return total
    return float(values.double().square_().sum())
