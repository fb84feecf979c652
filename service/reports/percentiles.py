"""Percentiles of what was measured: values that occurred, none between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of latencies in seconds."""

    p50: float
    p90: float
    p99: float


def percentile(values: Sequence[float], ratio: float) -> float:
    """The smallest value that so large a share of all does not exceed; there must be one at least."""
    return sorted(values)[max(0, math.ceil(ratio * len(values)) - 1)]


def percentiles_of(values: Sequence[float]) -> Percentiles | None:
    """None where nothing was measured."""
    return Percentiles(*(percentile(values, ratio) for ratio in (0.5, 0.9, 0.99))) if values else None
