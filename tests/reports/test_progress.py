"""What is told while a model loads: lines in a log, bars on a terminal."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from service.loading.progress import Phase
from service.reports.progress import LoggedProgress, TerminalProgress


def test_each_phase_leaves_a_line_with_its_seconds_and_bytes(caplog: pytest.LogCaptureFixture) -> None:
    progress = LoggedProgress()
    with caplog.at_level(logging.INFO, "service.reports.progress"):
        progress.enter(Phase.DOWNLOAD)
        progress.advance(300)
        progress.enter(Phase.LOAD, total_bytes=500)
        progress.advance(200)
        progress.advance(300)
        progress.enter(Phase.READY)
    assert [re.sub(r"\d+\.\d\d s", "T", line) for line in caplog.messages] == [
        "resolve took T; now download",
        "download took T, 300 bytes; now load, 500 bytes",
        "load took T, 500 bytes; now ready",
    ]


def test_a_long_phase_tells_the_time_left_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    always, seldom = LoggedProgress(interval_s=0), LoggedProgress(interval_s=1000)
    with caplog.at_level(logging.INFO, "service.reports.progress"):
        for progress in (always, seldom):
            progress.enter(Phase.LOAD, total_bytes=500)
            caplog.clear()
            progress.advance(200)
            if progress is always:
                (line,) = caplog.messages
                assert re.fullmatch(r"load: 200 of 500 bytes, about \d+ s left", line)
    assert caplog.messages == []


@pytest.mark.parametrize("end", [Phase.DRAINING, Phase.FAILED])
def test_a_phase_that_did_not_end_leaves_no_line(end: Phase, caplog: pytest.LogCaptureFixture) -> None:
    progress = LoggedProgress()
    with caplog.at_level(logging.INFO, "service.reports.progress"):
        progress.enter(end)
        progress.enter(Phase.WARMUP)  # a load that goes on
    assert caplog.messages == []


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def terminal(screen: io.StringIO) -> TerminalProgress:
    return TerminalProgress(Console(file=screen, force_terminal=True, width=120, color_system=None))


def test_a_terminal_sees_bytes_of_each_phase_that_counts_them(screen: io.StringIO) -> None:
    stderr = sys.stderr
    progress = terminal(screen)
    progress.enter(Phase.DOWNLOAD)
    progress.advance(5 * 1024)
    progress.enter(Phase.PLAN)
    progress.enter(Phase.LOAD, total_bytes=2048)
    progress.advance(2048)
    progress.enter(Phase.READY)
    last = screen.getvalue().rpartition("download")[2]
    assert "5.0/5.0 KiB" in last
    assert "2.0/2.0 KiB" in last
    assert "plan" not in last
    assert sys.stderr is stderr
    assert progress.snapshot().phase is Phase.READY


@pytest.mark.parametrize("end", [Phase.READY, Phase.DRAINING, Phase.FAILED])
def test_nothing_is_drawn_after_the_end(end: Phase, screen: io.StringIO) -> None:
    progress = terminal(screen)
    progress.enter(Phase.LOAD, total_bytes=10)
    progress.enter(end)
    drawn = screen.getvalue()
    assert drawn.endswith("\x1b[?25h"), "the cursor is shown again"
    progress.enter(Phase.WARMUP)
    progress.advance(5)
    assert screen.getvalue() == drawn
