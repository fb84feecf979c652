"""What llama.cpp makes of 256 neighbours, in float64 and without a thought of speed: weights after q4_k, q5_k, q6_k."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_LINES = {"q4_k": (15, -1.0, 20), "q5_k": (31, -0.5, 15)}  # steps, first candidate, candidates after it


def rounded(weight: Array, name: str) -> Array:
    """Float64[out, in] from weights of rows in a multiple of 256."""
    blocks = weight.astype(np.float64).reshape(-1, 256)
    found = _with_scales(blocks.reshape(-1, 16, 16)) if name == "q6_k" else _with_lines(blocks.reshape(-1, 8, 32), name)
    return found.reshape(weight.shape)


def _half(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float64)


def _safe(values: Array) -> Array:
    return np.where(values == 0, 1, values)


def _with_lines(x: Array, name: str) -> Array:
    """w ~ d sc code - dmin m, of [blocks, 8, 32]."""
    num_steps = _LINES[name][0]
    scales, minima = _best_lines(x, *_LINES[name])
    d, dmin = (values.max(1, keepdims=True) / 63 for values in (scales, minima))
    sc, m = np.rint(scales / _safe(d)), np.rint(minima / _safe(dmin))
    step, offset = (_half(d) * sc)[..., None], (_half(dmin) * m)[..., None]
    codes = np.clip(np.rint((x + offset) / _safe(step)), 0, num_steps)
    return np.asarray(np.where(step == 0, 0, codes) * step - offset)


def _best_lines(x: Array, num_steps: int, first: float, num_more: int) -> tuple[Array, Array]:
    """Scales and negated offsets of least weighed squared error, [blocks, 8] each."""
    v = np.sqrt((x**2).mean(2, keepdims=True)) + np.abs(x)
    low, high = np.minimum(x.min(2, keepdims=True), 0), x.max(2, keepdims=True)
    span = _safe(high - low)
    scale, offset = (high - low) / num_steps, low

    def codes_of(k: Array) -> Array:
        return np.asarray(np.clip(np.rint(k * (x - low)), 0, num_steps))

    def error_of(codes: Array, s: Array, m: Array) -> Array:
        return np.asarray((v * (s * codes + m - x) ** 2).sum(2, keepdims=True))

    best = error_of(codes_of(num_steps / span), scale, offset)
    total, sx = v.sum(2, keepdims=True), (v * x).sum(2, keepdims=True)
    for index in range(num_more + 1):
        codes = codes_of((num_steps + first + 0.1 * index) / span)
        sl, sll, slx = ((v * part).sum(2, keepdims=True) for part in (codes, codes**2, codes * x))
        determinant = total * sll - sl**2
        is_line = determinant > 0
        determinant = np.where(is_line, determinant, 1)
        s, m = (total * slx - sx * sl) / determinant, (sll * sx - sl * slx) / determinant
        s, m = np.where(m > 0, slx / _safe(sll), s), np.minimum(m, 0)
        error = error_of(codes, s, m)
        is_better = is_line & (error < best)
        best, scale, offset = (np.where(is_better, *pair) for pair in ((error, best), (s, scale), (m, offset)))
    return np.maximum(scale, 0)[..., 0], -offset[..., 0]


def _with_scales(x: Array) -> Array:
    """w ~ d sc (code - 32), of [blocks, 16, 16]."""
    peak = np.take_along_axis(x, np.abs(x).argmax(2)[..., None], 2)
    scale, best = np.zeros_like(peak), np.zeros_like(peak)
    for step in (0, *range(-9, 0), *range(1, 10)):
        codes = np.clip(np.rint(-(32 + 0.1 * step) / _safe(peak) * x), -32, 31)
        lx, ll = ((x**2 * part).sum(2, keepdims=True) for part in (codes * x, codes**2))
        gain = lx**2 / _safe(ll)
        scale, best = np.where(gain > best, lx / _safe(ll), scale), np.maximum(best, gain)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
    sc = np.clip(np.rint(-128 * scale / _safe(largest)), -128, 127)
    step_sizes = _half(largest / -128) * sc
    return np.asarray(np.clip(np.rint(x / _safe(step_sizes)), -32, 31) * step_sizes)
