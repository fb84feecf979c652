"""How far a start has come, written by the load thread and read by `/readyz`. No torch."""

from __future__ import annotations

import threading
import time
from enum import StrEnum
from typing import NamedTuple


class Phase(StrEnum):
    """Phases of a service's life, in order; `failed` may follow any."""

    RESOLVE = "resolve"
    DOWNLOAD = "download"
    PLAN = "plan"
    LOAD = "load"
    WARMUP = "warmup"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class ProgressSnapshot(NamedTuple):
    """One reading: the phase, bytes done and in all (0 where unknown), seconds since the start.

    Attributes:
        remaining_s: seconds until the phase ends if it goes on as it did so far; None where nothing tells.
    """

    phase: Phase
    done_bytes: int
    total_bytes: int
    elapsed_s: float
    remaining_s: float | None


class LoadProgress:
    """Phase and bytes of a start; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = Phase.RESOLVE
        self._done_bytes = 0
        self._total_bytes = 0
        self._started_at = self._entered_at = time.monotonic()

    def enter(self, phase: Phase, total_bytes: int = 0) -> None:
        """Begin a phase; its byte counts start at 0."""
        with self._lock:
            self._phase, self._done_bytes, self._total_bytes = phase, 0, total_bytes
            self._entered_at = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """Count bytes of the current phase as done."""
        with self._lock:
            self._done_bytes += num_bytes

    def expect(self, num_bytes: int) -> None:
        """Add bytes to those of the current phase, as it finds out about them."""
        with self._lock:
            self._total_bytes += num_bytes

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self._phase

    def snapshot(self) -> ProgressSnapshot:
        """All values at one moment."""
        with self._lock:
            now = time.monotonic()
            remaining_s = None
            if 0 < self._done_bytes <= self._total_bytes:
                remaining_s = (now - self._entered_at) * (self._total_bytes / self._done_bytes - 1)
            return ProgressSnapshot(
                self._phase, self._done_bytes, self._total_bytes, now - self._started_at, remaining_s
            )
