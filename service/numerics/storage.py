"""What a weight is stored as: shapes and dtypes of its buffers, before there are any.

Buffers of a weight [out, in], with S strips of T tiles as drawn in `packing`, and G groups per row:

    scheme              qweight                 scales                  zero_points
    w8a16, fp8          int8[S, T * 512]        float32[S * 16]
    w8a16-gN            int8[S, T * 512]        bfloat16[S, G, 16]
    wBa16-gN            uint8[S, T * 64 B]      bfloat16[S, G, 16]      uint8[S, G, 8], of 5 and 6 bits uint8[S, G, 16]
    wBa16-gN-sym        uint8[S, T * 64 B]      bfloat16[S, G, 16]
    nf4, fp4            uint8[S, T * 256]       float32[S, G, 16]
    q8_0                int8[S, T * 512]        float16[S, G, 16]
    q4_0, q5_0          uint8[S, T * 64 B]      float16[S, G, 16]
    nf4-dq              uint8[S, T * 256]       uint8[S, R, 16], see `double_quant`
    q4_k, q5_k, q6_k    uint8[S, T * 64 B]      uint8[S, R, 16], R bytes per row, see `superblocks`

Float offsets lie between scales, as of a group of their own: -float, q4_1 and q5_1 have scales [S, 2 G, 16]. One scale
per row, or per tensor, is float32: [S * 16], and [S, 2, 16] with an offset. Zero points of 8-bit codes are int8.

Outputs that only pad the last strip have codes and zero points 0, and scales 1 where these are floats; padded columns
have codes 0. Readers let neither meet an activation, nor keep such a result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from service.numerics import double_quant
from service.numerics.affine import code_dtype, num_groups
from service.numerics.packing import K_TILE, STRIP, num_strips, num_tiles
from service.numerics.schemes import QuantScheme
from service.numerics.superblocks import scale_bytes


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_values(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return self.num_values * self.dtype.itemsize

    def empty(self, device: torch.device | None = None) -> Tensor:
        """Such a tensor, uninitialised; no device: on the current default one."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class Buffers(NamedTuple):
    """The buffers of one weight; `zero_points` is None if none are stored."""

    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def strips(self, begin: int, end: int) -> Buffers:
        """Those of a run of strips; scales of whole rows lie in one run, others strip by strip."""
        per_strip = len(self.scales) // len(self.qweight)
        return Buffers(
            self.qweight[begin:end],
            self.scales[begin * per_strip : end * per_strip],
            None if self.zero_points is None else self.zero_points[begin:end],
        )


class StorageShapes(NamedTuple):
    """The buffers of one weight before they exist."""

    qweight: TensorSpec
    scales: TensorSpec
    zero_points: TensorSpec | None

    def empty(self, device: torch.device | None = None) -> Buffers:
        """Such buffers, uninitialised; no device: on the current default one."""
        zero_points = self.zero_points.empty(device) if self.zero_points else None
        return Buffers(self.qweight.empty(device), self.scales.empty(device), zero_points)

    @property
    def codes_bytes(self) -> int:
        """Bytes of the codes, padding included."""
        return self.qweight.num_bytes

    @property
    def scales_bytes(self) -> int:
        """Bytes of scales and zero points."""
        return self.scales.num_bytes + (self.zero_points.num_bytes if self.zero_points else 0)


def storage_shapes(out_features: int, in_features: int, scheme: QuantScheme) -> StorageShapes:
    """What `encode` makes of a weight of this size.

    Raises:
        QuantizationError: the scheme takes no rows of this size.
    """
    assert not scheme.is_mixed
    strips, groups = num_strips(out_features), num_groups(in_features, scheme.group_size)
    qweight = TensorSpec((strips, num_tiles(in_features) * K_TILE * STRIP * scheme.bits // 8), code_dtype(scheme))
    zero_points = None
    if scheme.offset == "asym":
        zero_points = TensorSpec((strips, groups, STRIP // 2 if scheme.bits <= 4 else STRIP), code_dtype(scheme))
    return StorageShapes(qweight, _scale_spec(strips, groups, in_features, scheme), zero_points)


def _scale_spec(strips: int, groups: int, in_features: int, scheme: QuantScheme) -> TensorSpec:
    if scheme.is_k_quant:
        return TensorSpec((strips, scale_bytes(scheme, in_features), STRIP), torch.uint8)
    if scheme.named == "nf4-dq":
        return TensorSpec((strips, double_quant.num_rows(groups), STRIP), torch.uint8)
    dtype = torch.float16 if scheme.is_block else torch.bfloat16
    if scheme.codebook or not scheme.group_size:
        dtype = torch.float32
    if scheme.offset == "float":
        return TensorSpec((strips, 2 * groups, STRIP), dtype)
    return TensorSpec((strips, groups, STRIP) if scheme.group_size else (strips * STRIP,), dtype)
