"""Native encoders: a weight is rounded and packed in one pass, to the same bits as by `numerics.encode`."""

from __future__ import annotations

import ctypes
import time
from functools import cache
from typing import Final

import torch
from torch import Tensor

from service.kernels.native import Library, packed_weight
from service.kernels.native import takes as multiplies
from service.numerics.codebook import levels, thresholds
from service.numerics.encode import EncodedWeight
from service.numerics.schemes import FP4, NF4, QuantScheme
from service.numerics.storage import Buffers, storage_shapes

_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum pw_dtype


class _Codebook(ctypes.Structure):
    """`pw_codebook` of native/kernels.h."""

    _fields_ = (("bounds", ctypes.c_float * 15), ("levels", ctypes.c_float * 16), ("codes", ctypes.c_uint8 * 16))


class _Source(ctypes.Structure):
    """`pw_source` of native/kernels.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("codebook", ctypes.POINTER(_Codebook)),
        ("dtype", ctypes.c_int32),
    )


@cache
def takes(scheme: QuantScheme) -> bool:
    """Whether there is an encoder for a scheme."""
    is_affine = not scheme.named and scheme.fit == "rtn" and not scheme.is_per_tensor
    is_affine = is_affine and (scheme.offset == "sym" or (scheme.offset == "asym" and scheme.group_size > 0))
    return (is_affine or scheme in (NF4, FP4)) and multiplies(scheme)


def is_encodable(weight: Tensor) -> bool:
    """Whether `encode` takes a weight: a matrix on the CPU, not empty, its rows one after another in memory."""
    return (
        weight.is_cpu
        and weight.dtype in _DTYPES
        and weight.dim() == 2
        and weight.numel() > 0
        and (weight.stride(1) == 1 or weight.shape[1] == 1)
        and (weight.stride(0) >= weight.shape[1] or weight.shape[0] == 1)
    )


def encode(library: Library, weight: Tensor, scheme: QuantScheme, *, into: Buffers | None = None) -> EncodedWeight:
    """Quantize and pack a weight on torch's threads.

    Args:
        weight: one that `is_encodable`.
        into: as `numerics.encode.encode` takes it.

    Returns:
        Buffers that are the same for any number of threads; `quantize_s` is all of the time, and `pack_s` is 0.

    Raises:
        QuantizationError: the weight holds NaN or infinity.
    """
    out_features, in_features = weight.shape
    started = time.perf_counter()
    qweight, scales, zero_points = into or storage_shapes(out_features, in_features, scheme).empty(weight.device)
    encoded = packed_weight(
        qweight, scales, zero_points, scheme=scheme, out_features=out_features, in_features=in_features
    )
    source = _Source(
        weights=weight.data_ptr(),
        row_stride=weight.stride(0),
        codebook=ctypes.pointer(_codebook(scheme)) if scheme.codebook else None,
        dtype=_DTYPES[weight.dtype],
    )
    signal, noise = library.encode(encoded, source)
    quantize_s = time.perf_counter() - started
    return EncodedWeight(qweight, scales, zero_points, signal, noise, quantize_s=quantize_s, pack_s=0.0)


@cache
def _codebook(scheme: QuantScheme) -> _Codebook:
    bounds, order = thresholds(scheme)
    rising = levels(scheme)[order.long()]
    return _Codebook(tuple(bounds.tolist()), tuple(rising.tolist()), tuple(order.tolist()))
