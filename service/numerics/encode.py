"""From a weight to the buffers of a layer, drawn in `storage`, and back, in chunks of strips."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import torch
from torch import Tensor

from service.errors import QuantizationError
from service.numerics import double_quant
from service.numerics.affine import (
    NOT_FINITE,
    Bounds,
    QuantizedWeight,
    by_group,
    code_dtype,
    num_groups,
    require_matrix,
)
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
from service.numerics.rounding import round_rows, weights_of
from service.numerics.schemes import NF4, NF4_DQ, QuantScheme
from service.numerics.storage import Buffers, storage_shapes

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


def encode(
    weight: Tensor, scheme: QuantScheme, *, into: Buffers | None = None, chunk_weights: int = CHUNK_WEIGHTS
) -> EncodedWeight:
    """Quantize and pack a weight; no float32 copy of the whole of it is ever made.

    Args:
        weight: float[out, in] on the CPU, finite, of any strides.
        into: buffers to fill, contiguous and of the sizes of `storage_shapes`; None makes new ones. Those of a run of
            strips of a larger weight are that run of its buffers, if the scheme is local to rows.
        chunk_weights: how many are rounded at a time, in whole rows; at least one row.

    Returns:
        Buffers that are the same for any number of threads.

    Raises:
        QuantizationError: the weight is not 2-D, is empty, holds NaN or infinity, or does not fit the scheme.
    """
    require_matrix(weight)
    if scheme == NF4_DQ:
        return double_quantize(weight, encode, into=into)
    out_features, in_features = weight.shape
    qweight, scales, zero_points = into or storage_shapes(out_features, in_features, scheme).empty(weight.device)
    strips_per_chunk = max(1, chunk_weights // (STRIP * in_features))
    bounds = _bounds_of_all(weight) if scheme.is_per_tensor else None

    def encode_strips(first: int) -> _ChunkFigures:
        strips = slice(first, first + strips_per_chunk)
        started = time.perf_counter()
        rows = weight[strips.start * STRIP : strips.stop * STRIP]
        rounded, signal, noise = _round(rows, scheme, max_rows=max(1, chunk_weights // in_features), bounds=bounds)
        quantized = time.perf_counter()
        qweight[strips] = pack_tiles(rounded.codes, scheme.bits)
        scales.view(len(qweight), -1, STRIP)[strips] = to_strips(rounded.scales)
        if zero_points is not None and rounded.zero_points is not None:
            points = to_strips(rounded.zero_points)
            zero_points[strips] = pack_nibbles(points) if scheme.bits <= 4 else points
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


def double_quantize(weight: Tensor, encode_as: Callable[..., EncodedWeight], *, into: Buffers | None) -> EncodedWeight:
    """Encode a weight as `nf4-dq`.

    Args:
        encode_as: an encoder like `encode`, for `nf4`.
        into: as `encode` takes it.
    """
    require_matrix(weight)
    out_features, in_features = weight.shape
    qweight, stored, _ = into or storage_shapes(out_features, in_features, NF4_DQ).empty(weight.device)
    single = storage_shapes(out_features, in_features, NF4).scales.empty(weight.device)
    encoded = encode_as(weight, NF4, into=Buffers(qweight, single, None))
    started = time.perf_counter()
    rows_at_once = max(1, CHUNK_WEIGHTS // (STRIP * in_features)) * STRIP
    scales = from_strips(single)
    for first in range(0, out_features, rows_at_once) if (scales == 1).any() else ():
        for groups, some in by_group(weight[first : first + rows_at_once].float().contiguous(), NF4.group_size):
            is_zero = some.abs().amax(2) < torch.finfo(torch.float32).tiny  # stored with scale 1, which is no scale
            scales[first : first + len(some), groups].masked_fill_(is_zero, 0)
    stored.copy_(double_quant.compress(to_strips(scales), out_features))
    noise = 0.0
    for first in range(0, out_features, rows_at_once):
        rows, strips = weight[first : first + rows_at_once], slice(first // STRIP, (first + rows_at_once) // STRIP)
        part = (qweight[strips], stored[strips], None)
        decoded = decode(*part, scheme=NF4_DQ, out_features=len(rows), in_features=in_features)
        noise += _sum_of_squares(decoded.sub_(rows))
    seconds = time.perf_counter() - started
    return encoded._replace(scales=stored, noise=noise, quantize_s=encoded.quantize_s + seconds)


def _bounds_of_all(weight: Tensor) -> Bounds:
    """Of a whole tensor, without a copy of it."""
    low, high = weight.aminmax()
    return Bounds(low.float().view(1, 1, 1), high.float().view(1, 1, 1))


def _round(
    rows: Tensor, scheme: QuantScheme, *, max_rows: int, bounds: Bounds | None
) -> tuple[QuantizedWeight, float, float]:
    """Quantize the rows of some strips, `max_rows` at a time: padded codes, scales and zero points, signal, noise."""
    num_rows, in_features = rows.shape
    outputs = num_strips(num_rows) * STRIP
    shapes = storage_shapes(num_rows, in_features, scheme)
    codes = rows.new_zeros(outputs, num_tiles(in_features) * K_TILE, dtype=shapes.qweight.dtype)
    scales = rows.new_ones(outputs, shapes.scales.num_values // outputs, dtype=shapes.scales.dtype)
    if not shapes.scales.dtype.is_floating_point:
        scales.zero_()
    zero_points = None
    if scheme.offset == "asym":
        zero_points = rows.new_zeros(outputs, num_groups(in_features, scheme.group_size), dtype=code_dtype(scheme))
    signal = noise = 0.0
    for first in range(0, num_rows, max_rows):
        part = slice(first, min(first + max_rows, num_rows))
        chunk = rows[part].to(torch.float32, memory_format=torch.contiguous_format)
        energy = _sum_of_squares(chunk)
        if not math.isfinite(energy):
            raise QuantizationError(NOT_FINITE)
        rounded = round_rows(chunk, scheme, bounds)
        codes[part, :in_features] = rounded.codes
        scales[part] = rounded.scales
        if zero_points is not None and rounded.zero_points is not None:
            zero_points[part] = rounded.zero_points
        signal += energy
        noise += _sum_of_squares(weights_of(rounded, scheme).sub_(chunk))
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
    codes = decode_codes(qweight, scheme=scheme, out_features=out_features, in_features=in_features)
    points = None
    if zero_points is not None:
        nibbles = scheme.bits <= 4
        points = from_strips(unpack_nibbles(zero_points) if nibbles else zero_points)[:out_features]
    by_row = from_strips(_by_strip(scales, scheme, in_features))[:out_features]
    return weights_of(QuantizedWeight(codes, by_row, points), scheme)


def decode_codes(qweight: Tensor, *, scheme: QuantScheme, out_features: int, in_features: int) -> Tensor:
    """Unpack the codes of a weight as they are, padding left out: int8 or uint8[out, in]."""
    return unpack_tiles(qweight, scheme.bits)[:out_features, :in_features]


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
    if zero_points is not None and scheme.bits <= 4:
        shift = (output % 2 * 4).to(torch.uint8)[:, None]
        points = zero_points[strip, :, output // 2] >> shift & 15
    elif zero_points is not None:
        points = zero_points[strip, :, output]
    strips = scales.view(-1, STRIP)[strip] if scales.dim() == 1 else scales[strip]
    by_row = _by_strip(strips, scheme, in_features)[torch.arange(len(rows), device=rows.device), :, output]
    return weights_of(QuantizedWeight(codes, by_row, points), scheme)


def _by_strip(scales: Tensor, scheme: QuantScheme, in_features: int) -> Tensor:
    """Scales as they lie in strips, those of rows as of one group; not compressed twice: [S, values, 16]."""
    if scheme.named == "nf4-dq":
        return double_quant.expand(scales, num_groups(in_features, scheme.group_size))
    return scales if scales.dim() == 3 else scales.view(-1, 1, STRIP)


def _sum_of_squares(values: Tensor) -> float:
    """Sum of squares; in float64 where float32 would over- or underflow."""
    total = float(torch.linalg.vector_norm(values, dim=1).square_().sum(dtype=torch.float64))
    if 1e-20 < total < float("inf"):
        return total
    return float(values.double().square_().sum())
