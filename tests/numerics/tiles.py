"""Where a code lies in strips and tiles, element by element as the drawing of the C interface says."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[Any]


def codes_of(qweight: Tensor, out_features: int, in_features: int, *, bits: int) -> Array:
    """The codes [out, in] in int8[S, T * 512] or uint8[S, T * 64 * bits]."""
    output, column = np.indices((out_features, in_features))
    strip, tile = output // 16, column // 32
    row, lane = column % 32 // 2, 2 * (output % 16) + column % 2
    data = qweight.numpy()
    if bits == 8:
        z, h = row // 2, row % 2
        return np.asarray(data[strip, 512 * tile + 64 * z + 16 * (lane // 8) + 8 * h + lane % 8])
    codes, shift, first = np.zeros(output.shape, dtype=np.uint8), 0, 0
    for width in {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}[bits]:
        start, bit = 64 * bits * tile + 32 * bits * (row // 8) + 32 * first, width * (row % 8)  # of half a tile
        if width == 1:
            plane = data[strip, start + lane] >> bit & 1
        else:
            plane = data[strip, start + 64 * (bit // 16) + 2 * lane + bit % 16 // 8] >> bit % 8 & 2**width - 1
        codes |= (plane << shift).astype(np.uint8)
        shift, first = shift + width, first + width
    return codes


def group_values_of(values: Tensor, out_features: int) -> Array:
    """Scales float[S, G, 16] as [out, G]; a row has one group in float[S * 16]."""
    output = np.arange(out_features)
    data = values.float().numpy()
    return np.asarray(data[output, None] if values.dim() == 1 else data[output // 16, :, output % 16])


def zero_points_of(packed: Tensor, out_features: int) -> Array:
    """Zero points uint8[S, G, 8], or unpacked [S, G, 16], as [out, G]."""
    output = np.arange(out_features)
    if packed.shape[2] == 16:
        return np.asarray(packed.numpy()[output // 16, :, output % 16])
    return np.asarray(packed.numpy()[output // 16, :, output % 16 // 2] >> 4 * (output % 2)[:, None] & 15)


def padding_of(qweight: Tensor, out_features: int, in_features: int, *, bits: int) -> Array:
    """The codes that only pad: a flat array."""
    tile_bytes = 64 * bits
    outputs, columns = 16 * len(qweight), qweight.shape[1] // tile_bytes * 32
    codes = codes_of(qweight, outputs, columns, bits=bits)
    return np.concatenate([codes[out_features:].ravel(), codes[:out_features, in_features:].ravel()])
