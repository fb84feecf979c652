"""Writes a model into the cache beside the requests that it serves."""

from __future__ import annotations

import threading
from typing import Final

from service.loading.artifact_load import UncachedModel
from service.loading.background import be_modest

_END_S: Final = 10.0
"""How long `join` waits for a write or a flush that is under way; what it leaves is removed by the next writer."""


class CacheWriter:
    """Writes once, on a thread of low priority.

    Args:
        uncached: None for nothing to be written.
        phase_seconds: of the load report; what writing took is added.
    """

    def __init__(self, uncached: UncachedModel | None, phase_seconds: dict[str, float]) -> None:
        self._uncached = uncached
        self._phase_seconds = phase_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)

    def start(self) -> None:
        """Begin, if there is something to write."""
        if self._uncached is not None:
            self._thread.start()

    def stop(self) -> None:
        """End it if it still runs, within some megabytes; `join` waits for that."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the end of what was stopped."""
        if self._thread.is_alive():
            self._thread.join(_END_S)

    def _run(self) -> None:
        assert self._uncached is not None
        be_modest()
        self._phase_seconds["cache_write"] = self._uncached.save(self._stop) or 0.0
