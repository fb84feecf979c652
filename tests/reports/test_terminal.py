"""Progress that is drawn on terminals only, and durations for people."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from service.reports.terminal import duration, terminal_progress


def test_progress_is_drawn_on_a_terminal_only() -> None:
    shown = {}
    for is_terminal in (True, False):
        screen = io.StringIO()
        with terminal_progress(Console(file=screen, force_terminal=is_terminal, width=100)) as show:
            show("64x64: packing", 1, 7)
        shown[is_terminal] = "64x64: packing" in screen.getvalue()
    assert shown == {True: True, False: False}


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.25e-7, "0.125 us"), (5e-4, "500 us"), (0.0123456, "12.3 ms"), (2.5, "2.5 s")]
)
def test_a_duration_has_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
