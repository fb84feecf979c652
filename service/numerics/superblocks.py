"""The k-quants of GGUF: 256 neighbours of a row share float16 scales of scales, which are integers themselves.

    format      groups of       codes           w'                              stored per 256 weights besides codes
    q4_k        32 weights      0..15           d sc code - dmin m              d, dmin, eight sc and eight m of 6 bits
    q5_k        32 weights      0..31           d sc code - dmin m              the same
    q6_k        16 weights      0..63           d sc (code - 32)                sixteen sc of 8 bits, d

The fits are those of llama.cpp. q4_k and q5_k: the best of 21 or 16 lines by least squares, each squared error weighed
by |w| + the root mean square of the group, offsets never above 0. q6_k: the best of 20 scales around signed max / -32,
squared errors weighed by w^2. Then scales are rounded to integers, and codes are chosen against what is stored.

The bytes of 256 weights are those of llama.cpp: d, dmin, twelve of sc and m for q4_k and q5_k; sc, d for q6_k.

Source: ggml/src/ggml-quants.c of llama.cpp, `quantize_row_q4_K_ref` and its neighbours.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from service.errors import QuantizationError
from service.numerics.affine import QuantizedWeight, bounds_of, by_group, refuse_nonfinite, to_codes
from service.numerics.fits import Search, in_columns
from service.numerics.schemes import SUPERBLOCK, QuantScheme

_LINE_STEPS: Final = {"q4_k": tuple(i / 10 - 1 for i in range(21)), "q5_k": tuple(i / 10 - 0.5 for i in range(16))}
_SCALE_STEPS: Final = (0, *(i / 10 for i in range(-9, 10) if i))
_SMALLEST: Final = 1e-15  # a group of smaller weights is zeros; float16 scales end before, at 6e-8
_BLOCK_BYTES: Final = {"q4_k": 16, "q5_k": 16, "q6_k": 18}


def scale_bytes(scheme: QuantScheme, in_features: int) -> int:
    """Of a row: all that is stored besides codes.

    Raises:
        QuantizationError: a row is not a multiple of 256 weights.
    """
    if in_features % SUPERBLOCK:
        raise QuantizationError(
            f"rows of {in_features} weights cannot be stored as {scheme.name}, they must be multiples of {SUPERBLOCK}; "
            "use q5_0, q5_1 or q8_0 there"
        )
    return in_features // SUPERBLOCK * _BLOCK_BYTES[scheme.named]


def quantize_superblocks(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Round float32[out, in], in a multiple of 256.

    Returns:
        Codes, and bytes uint8[out, scale bytes].

    Raises:
        QuantizationError: the weight holds NaN or infinity, or is too large for float16 scales.
    """
    scale_bytes(scheme, weight.shape[1])
    ((_, grouped),) = by_group(weight, scheme.group_size)
    stored = _scales(grouped) if scheme.named == "q6_k" else _lines(grouped, scheme)
    values = expand_scales(stored, scheme)
    if not values.isfinite().all():
        refuse_nonfinite(weight)
        raise QuantizationError(
            f"the weight is up to {float(weight.abs().max()):.3g} large, which the float16 scales of {scheme.name} "
            "cannot hold; use w8a16 or w4a16 there"
        )
    scales, *offsets = values.view(*grouped.shape[:2], -1, 1).unbind(2)
    steps = (grouped - offsets[0] if offsets else grouped.clone()).div_(scales).round_()
    steps.masked_fill_(scales == 0, 0)
    return QuantizedWeight(to_codes(steps if offsets else steps.add_(32), scheme), stored, None)


def expand_scales(stored: Tensor, scheme: QuantScheme) -> Tensor:
    """Bytes [out, scale bytes] to float32 scales [out, groups], or to scales and offsets in turns."""
    blocks = stored.view(len(stored), -1, _BLOCK_BYTES[scheme.named])
    if scheme.named == "q6_k":
        return (_halves(blocks[..., 16:]) * blocks[..., :16].view(torch.int8)).flatten(1)
    scales, minima = (_halves(blocks[..., first : first + 2]) for first in (0, 2))
    a, b, c = blocks[..., 4:].reshape(*blocks.shape[:2], 3, 4).unbind(2)
    sc = torch.cat((a & 63, c & 15 | a >> 6 << 4), 2)
    m = torch.cat((b & 63, c >> 4 | b >> 6 << 4), 2)
    return torch.stack((scales * sc, -(minima * m)), 3).flatten(1)


def _halves(pairs: Tensor) -> Tensor:
    """Bytes [..., 2] as float32[..., 1]."""
    return pairs.contiguous().view(torch.float16).float()


def _bytes(halves: Tensor) -> Tensor:
    """Float32[...] as float16 bytes [..., 2]."""
    return halves.half()[..., None].view(torch.uint8)


def _lines(grouped: Tensor, scheme: QuantScheme) -> Tensor:
    """Bytes of q4_k and q5_k for [out, groups, weights]."""
    num_steps = (1 << scheme.bits) - 1

    def best_line(x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = x.amin(0).clamp_(max=0), x.amax(0)
        spans = high - low
        spans.masked_fill_(spans == 0, 1)
        search = Search(x, (0, num_steps), x.square().mean(0).sqrt_() + x.abs())
        inverses = (num_steps + x.new_tensor(_LINE_STEPS[scheme.named])[:, None]) / spans
        best = search.fit_line(inverses, -low * inverses, is_offset_positive=False).best()
        return best.scales.clamp(min=0), best.offsets.neg().clamp_(min=0)

    is_zero = grouped.abs().amax(2) < _SMALLEST
    scales, minima = in_columns(grouped, best_line)
    scales, minima = (x.masked_fill(is_zero, 0).view(len(x), -1, 8) for x in (scales, minima))
    (d, sc), (dmin, m) = (_six_bits(x) for x in (scales, minima))
    a, b = (x[..., :4] | x[..., 4:] >> 4 << 6 for x in (sc, m))
    c = sc[..., 4:] & 15 | m[..., 4:] << 4
    return torch.cat((_bytes(d), _bytes(dmin), a, b, c), 2).flatten(1)


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Positive values [..., 8] as a float32[...] scale and codes uint8[..., 8] up to 63."""
    largest = values.amax(2, keepdim=True)
    inverses = 63 / largest.masked_fill(largest == 0, 1)
    return largest[..., 0] / 63, (values * inverses).round_().clamp_(0, 63).nan_to_num_(0).to(torch.uint8)


def _scales(grouped: Tensor) -> Tensor:
    """Bytes of q6_k for [out, groups, weights]."""
    low, high = bounds_of(grouped)
    peaks = torch.where(high >= -low, high, low)
    normed = grouped / peaks.masked_fill(peaks == 0, 1)  # in -1..1, so that cubes stay floats

    def best_scale(x: Tensor) -> tuple[Tensor]:
        squares = x * x
        best = torch.zeros_like(x[0])
        slopes = torch.zeros_like(x[0])
        codes, product = torch.empty_like(x), torch.empty_like(x)
        for step in _SCALE_STEPS:
            torch.mul(x, -(32 + step), out=codes).round_().clamp_(-32, 31)
            weighted = torch.mul(codes, squares, out=product)
            ll = (weighted * codes).sum(0)
            lx = weighted.mul_(x).sum(0)
            gain = lx * lx / ll.masked_fill(ll == 0, 1)
            slopes = torch.where(gain > best, lx / ll.masked_fill(ll == 0, 1), slopes)
            best = torch.maximum(best, gain)
        return (slopes,)

    (slopes,) = in_columns(normed, best_scale)
    scales = (slopes * peaks[..., 0]).view(len(slopes), -1, 16)
    largest = scales.gather(2, scales.abs().argmax(2, keepdim=True))
    inverses = -128 / largest.masked_fill(largest == 0, 1)
    sc = (scales * inverses).round_().clamp_(-128, 127).nan_to_num_(0).to(torch.int8).view(torch.uint8)
    return torch.cat((sc, _bytes(largest[..., 0] / -128)), 2).flatten(1)
