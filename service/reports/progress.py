"""How a start proceeds, for whoever watches stderr: bars on a terminal, a line for each phase in a log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from service.loading.progress import LoadProgress, Phase

logger = logging.getLogger(__name__)

_LAST = frozenset({Phase.READY, Phase.DRAINING, Phase.FAILED})


class LoggedProgress(LoadProgress):
    """Logs each phase that ends, with its seconds and bytes, and the next one; now and then the time left."""

    def __init__(self, *, interval_s: float = 10.0) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._entered_s = self._told_s = 0.0

    def enter(self, phase: Phase, total_bytes: int = 0) -> None:
        """Begin a phase."""
        ended = self.snapshot()
        seconds = ended.elapsed_s - self._entered_s
        self._entered_s = self._told_s = ended.elapsed_s
        super().enter(phase, total_bytes)
        if ended.phase in _LAST or phase in (Phase.DRAINING, Phase.FAILED):
            return
        done = f", {ended.done_bytes} bytes" if ended.done_bytes else ""
        ahead = f", {total_bytes} bytes" if total_bytes else ""
        logger.info("%s took %.2f s%s; now %s%s", ended.phase, seconds, done, phase, ahead)

    def advance(self, num_bytes: int) -> None:
        """Count bytes of the current phase as done."""
        super().advance(num_bytes)
        phase, done, total, elapsed_s, remaining_s = self.snapshot()
        if remaining_s is not None and elapsed_s - self._told_s >= self._interval_s:
            self._told_s = elapsed_s
            logger.info("%s: %d of %d bytes, about %.0f s left", phase, done, total, remaining_s)


class TerminalProgress(LoadProgress):
    """Draws a bar for each phase until the last one; log lines stand above the bars."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._bars = Progress(
            TextColumn("{task.description:8}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._bar: TaskID | None = None
        self._is_over = False

    def enter(self, phase: Phase, total_bytes: int = 0) -> None:
        """Begin a phase with a new bar; that of the one before stays, full, if it counted bytes."""
        ended = self.snapshot()
        super().enter(phase, total_bytes)
        bar, self._bar = self._bar, None
        if bar is not None and ended.done_bytes:
            self._bars.update(bar, total=ended.done_bytes)
            self._bars.stop_task(bar)
        elif bar is not None:
            self._bars.remove_task(bar)
        self._is_over |= phase in _LAST
        if self._is_over:  # also where a load goes on behind a signal
            self._bars.stop()
        else:
            self._bar = self._bars.add_task(phase, total=total_bytes or None)
            self._bars.start()

    def advance(self, num_bytes: int) -> None:
        """Count bytes of the current phase as done."""
        super().advance(num_bytes)
        if self._bar is not None:
            self._bars.advance(self._bar, num_bytes)


@contextmanager
def shown_load() -> Iterator[LoadProgress]:
    """For a command that loads and ends: bars on stderr, if that is a terminal."""
    progress = TerminalProgress() if sys.stderr.isatty() else LoadProgress()
    try:
        yield progress
    finally:
        progress.enter(Phase.READY)
