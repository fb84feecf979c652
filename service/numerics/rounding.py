"""The one place that picks how rows become codes, and codes weights: a line for each kind of scheme."""

from __future__ import annotations

from torch import Tensor

from service.numerics.affine import Bounds, QuantizedWeight, dequantize, quantize
from service.numerics.blocks import quantize_blocks
from service.numerics.codebook import dequantize_levels, quantize_to_levels
from service.numerics.fits import fit
from service.numerics.float8 import levels_of, quantize_to_float8
from service.numerics.schemes import QuantScheme
from service.numerics.superblocks import expand_scales, quantize_superblocks


def round_rows(weight: Tensor, scheme: QuantScheme, bounds: Bounds | None = None) -> QuantizedWeight:
    """Quantize rows float32[out, in], finite; scales are of the dtype that they are stored in.

    Args:
        bounds: of the whole tensor, if the scheme has one scale for it.

    Raises:
        QuantizationError: the rows do not fit the scheme.
    """
    if scheme.codebook:
        return quantize_to_levels(weight, scheme)
    if scheme.named == "fp8":
        return quantize_to_float8(weight)
    if scheme.is_block:
        return quantize_blocks(weight, scheme)
    if scheme.is_k_quant:
        return quantize_superblocks(weight, scheme)
    if scheme.fit != "rtn":
        return fit(weight, scheme)
    return quantize(weight, scheme, bounds=bounds)


def weights_of(quantized: QuantizedWeight, scheme: QuantScheme) -> Tensor:
    """Map codes back to weights float32[out, in]."""
    codes, scales, zero_points = quantized
    if scheme.codebook:
        return dequantize_levels(codes, scales, scheme)
    if scheme.named == "fp8":
        return levels_of(codes).float().mul_(scales)
    if scheme.is_k_quant:
        scales = expand_scales(scales, scheme)
    return dequantize(codes, scales, zero_points, scheme)
