"""The bytes that GGUF stores for a rounded weight, put together as its format says, in numpy."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from service.numerics.affine import QuantizedWeight
from service.numerics.schemes import QuantScheme

Array = npt.NDArray[Any]

TYPES = {
    name: gguf.GGMLQuantizationType[name.upper()]
    for name in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
}


def ggml_bytes(rounded: QuantizedWeight, scheme: QuantScheme) -> Array:
    """Rows of bytes, of codes and scales that `numerics.rounding` gives for whole blocks."""
    codes = rounded.codes.numpy()
    rows, columns = codes.shape
    if scheme.is_k_quant:
        blocks = codes.reshape(rows, columns // 256, 256)
        stored = rounded.scales.numpy().reshape(rows, columns // 256, -1)
        parts = _q6_k(blocks, stored) if scheme.name == "q6_k" else _lines(blocks, stored, scheme.bits)
        return np.concatenate(parts, -1).reshape(rows, -1)
    blocks = codes.reshape(rows, columns // 32, 32)
    parts = [rounded.scales.numpy().reshape(rows, columns // 32, -1).view(np.uint8)]
    if scheme.bits == 8:
        return np.concatenate([*parts, blocks.view(np.uint8)], -1).reshape(rows, -1)
    if scheme.bits == 5:
        parts.append(np.packbits(blocks >> 4, axis=-1, bitorder="little"))
    parts.append(blocks[..., :16] & 15 | blocks[..., 16:] << 4)
    return np.concatenate(parts, -1).reshape(rows, -1)


def _nibbles(blocks: Array, run: int) -> Array:
    """Low nibbles of each run beside those of the next one."""
    pairs = (blocks & 15).reshape(*blocks.shape[:2], -1, 2, run)
    return np.asarray((pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*blocks.shape[:2], -1))


def _lines(blocks: Array, stored: Array, bits: int) -> list[Array]:
    high = []
    if bits == 5:
        bit = (blocks >> 4).reshape(*blocks.shape[:2], 8, 32)
        high.append(np.bitwise_or.reduce(bit << np.arange(8, dtype=np.uint8)[:, None], axis=2))
    return [stored, *high, _nibbles(blocks, 32)]


def _q6_k(blocks: Array, stored: Array) -> list[Array]:
    fours = (blocks >> 4).reshape(*blocks.shape[:2], 2, 4, 32)
    high = np.bitwise_or.reduce(fours << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=3)
    return [_nibbles(blocks, 64), high.reshape(*blocks.shape[:2], -1), stored]
