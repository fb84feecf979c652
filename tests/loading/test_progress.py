"""What a load says of how far it is: bytes, and the time that is left at the speed so far."""

from __future__ import annotations

import pytest

from service.loading.progress import LoadProgress, Phase


def test_nothing_is_said_of_the_time_left_before_anything_is_done() -> None:
    progress = LoadProgress()
    progress.enter(Phase.LOAD, total_bytes=100)
    assert progress.snapshot().remaining_s is None


def test_nothing_is_said_of_the_time_left_of_a_phase_of_unknown_length() -> None:
    progress = LoadProgress()
    progress.enter(Phase.DOWNLOAD)
    progress.advance(5)
    assert progress.snapshot().remaining_s is None


def test_the_time_left_is_that_of_the_phase_at_its_speed_so_far() -> None:
    progress = LoadProgress()
    before = progress.snapshot().elapsed_s
    progress.enter(Phase.LOAD, total_bytes=100)
    entered = progress.snapshot().elapsed_s
    progress.advance(20)
    snapshot = progress.snapshot()
    assert snapshot.remaining_s is not None
    # Between the two readings around its begin, the phase began; four times what it took is left.
    assert 4 * (snapshot.elapsed_s - entered) <= snapshot.remaining_s <= 4 * (snapshot.elapsed_s - before)
    progress.advance(80)
    assert progress.snapshot().remaining_s == 0


def test_more_than_was_expected_says_nothing() -> None:
    progress = LoadProgress()
    progress.enter(Phase.DOWNLOAD, total_bytes=10)
    progress.advance(11)
    assert progress.snapshot().remaining_s is None
    progress.expect(12)
    assert progress.snapshot().remaining_s == pytest.approx(0, abs=60)
