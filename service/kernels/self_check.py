"""Whether the kernels compute on this machine what torch does: asked once, before a model is served with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from service.kernels import reference
from service.kernels.native import Library, packed_weight
from service.numerics.encode import EncodedWeight, encode
from service.numerics.schemes import QuantScheme, parse_scheme

_SCHEMES: Final = ("w8a16", "w4a16-g64", "nf4")
_SIZE: Final = (65, 200)  # outputs and inputs: neither fills its strips and tiles
_ROWS: Final = (1, 8, 80)  # of each regime
_BOUND: Final = 4 * 2**-8
"""Of errors relative to the norm of the product: either side rounds weights and results to bfloat16 at most."""

Multiply = Callable[[Tensor, EncodedWeight, QuantScheme], Tensor]


def is_right(library: Library) -> bool:
    """Whether products of a library agree with torch's; 10 ms."""
    out_features, in_features = _SIZE

    def multiply(x: Tensor, encoded: EncodedWeight, scheme: QuantScheme) -> Tensor:
        weight = packed_weight(
            encoded.qweight,
            encoded.scales,
            encoded.zero_points,
            scheme=scheme,
            out_features=out_features,
            in_features=in_features,
        )
        return library.linear(x, weight, None)

    return agrees(multiply)


def agrees(multiply: Multiply) -> bool:
    """Whether products of bfloat16 activations agree with torch's, for each kind of format and number of rows."""
    generator = torch.Generator().manual_seed(0)
    for scheme in map(parse_scheme, _SCHEMES):
        encoded = encode(torch.randn(_SIZE, generator=generator), scheme)
        for rows in _ROWS:
            x = torch.randn(rows, _SIZE[1], generator=generator).bfloat16()
            expected = _by_torch(x.float(), encoded, scheme)
            error = (multiply(x, encoded, scheme).float() - expected).norm() / expected.norm()
            if not error <= _BOUND:  # NaN is none
                return False
    return True


def _by_torch(x: Tensor, encoded: EncodedWeight, scheme: QuantScheme) -> Tensor:
    qweight, scales, zero_points = encoded[:3]
    if scheme.group_size:
        return reference.linear_packed(x, qweight, scales, zero_points, scheme=scheme, out_features=_SIZE[0], bias=None)
    return reference.linear_w8a16(x, qweight, scales, None, out_features=_SIZE[0])
