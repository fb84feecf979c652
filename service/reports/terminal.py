"""What the tables of both benchmarks share: progress on a terminal, durations for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

FILE_WIDTH: Final = 160
"""Columns of a table that is not printed on a terminal."""


@contextmanager
def terminal_progress(console: Console | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, if that is a terminal; it is drawn between measurements only, which would notice a thread."""
    console = console or Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as bars:
        bar = bars.add_task("")

        def show(text: str, num_done: int, num_all: int) -> None:
            bars.update(bar, description=text, completed=num_done, total=num_all, refresh=True)

        yield show


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
