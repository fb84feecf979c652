"""Histograms of values that come in pieces, whose range is not known before."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

NUM_BINS: Final = 512
_SMALLEST_EXPONENT: Final = -149
"""Of a range: that of the smallest float32."""
_CHUNK: Final = 1 << 20


class Histogram:
    """Counts of values in bins of equal width over [-2**exponent, 2**exponent].

    The range is the smallest power of two that holds all values so far. When it grows, neighbouring bins become one, so
    that the counts are the same whatever the pieces are and in which order they come.

    Attributes:
        counts: int64[512], of values at or above the lower edge of a bin and below the upper one; the last bin also
            has those at its upper edge.
        exponent: of the range.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(NUM_BINS, dtype=np.int64)
        self.exponent = _SMALLEST_EXPONENT

    @property
    def edges(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """float64[513], those of the bins."""
        return np.linspace(-(2.0**self.exponent), 2.0**self.exponent, NUM_BINS + 1)

    def add(self, values: Tensor) -> None:
        """Count a piece: float32[any], finite; it is left as it was."""
        self._widen(_exponent_of(float(values.abs().max())))
        scale = NUM_BINS / 2 * 2.0**-self.exponent  # a power of two: products are exact
        for chunk in torch.split(values.flatten(), _CHUNK):
            places = chunk.double().mul_(scale).floor_().add_(NUM_BINS / 2).clamp_(0, NUM_BINS - 1)
            self.counts += torch.bincount(places.int(), minlength=NUM_BINS).numpy()

    def merge(self, other: Histogram) -> None:
        """Count all that another has counted."""
        self._widen(other.exponent)
        copy = Histogram()
        copy.counts, copy.exponent = other.counts.copy(), other.exponent
        copy._widen(self.exponent)
        self.counts += copy.counts

    def _widen(self, exponent: int) -> None:
        for _ in range(min(exponent - self.exponent, NUM_BINS.bit_length())):  # after so many all is in the middle
            half = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(half, NUM_BINS // 4)
        self.exponent = max(self.exponent, exponent)


def _exponent_of(largest: float) -> int:
    """The exponent of the smallest power of two that is not below a value."""
    mantissa, exponent = math.frexp(largest)
    return max(exponent - (mantissa == 0.5), _SMALLEST_EXPONENT) if largest else _SMALLEST_EXPONENT
