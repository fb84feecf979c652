"""Copies in turn, rounds and ratios: everything about a measurement but its figures."""

from __future__ import annotations

import itertools

import pytest
import torch

from service.reports.bench_runs import (
    FULL_ROUNDS,
    LEAST_ROUNDS,
    LONG_POINT,
    Copies,
    calling_run,
    in_turns,
    is_enough,
    median_ratio,
    reading_run,
)

PARTS = [torch.arange(10, dtype=torch.int8), torch.arange(3, dtype=torch.float32)]  # 10 and 12 bytes, each in 64


def test_every_copy_holds_what_was_copied() -> None:
    copies = Copies(PARTS, 1000)
    assert len(copies.parts) == copies.count
    for parts in copies.parts:
        assert all(torch.equal(part, copied) for part, copied in zip(PARTS, parts, strict=True))
    copies.parts[0][0].zero_()
    assert torch.equal(copies.parts[1][0], PARTS[0])


@pytest.mark.parametrize(("footprint_bytes", "count"), [(1, 2), (256, 2), (257, 3), (1000, 8), (1024, 8), (1025, 9)])
def test_copies_fill_the_footprint_and_are_two_at_least(footprint_bytes: int, count: int) -> None:
    copies = Copies(PARTS, footprint_bytes)
    assert copies.count == count
    assert copies.num_bytes == 22
    assert copies.memory.nbytes == count * 128 >= footprint_bytes


def test_no_copy_is_used_again_before_all_others_were() -> None:
    copies = Copies(PARTS, 1000)
    taken = [index for count in (3, 1, 7, 20, 1) for index in copies.take(count)]
    assert taken == list(itertools.islice(itertools.cycle(range(copies.count)), 32))


def test_bytes_that_are_read_continue_where_calls_have_stopped() -> None:
    copies = Copies(PARTS, 1000)
    copies.take(6)
    assert [(piece.storage_offset(), len(piece)) for piece in copies.take_bytes(3)] == [(6 * 128, 256), (0, 128)]
    assert copies.take(1) == [1]
    assert sum(map(len, copies.take_bytes(100))) == copies.memory.nbytes
    assert copies.take(1) == [2]


def test_a_run_of_calls_goes_through_all_copies() -> None:
    copies = Copies(PARTS, 1000)
    called: list[int] = []
    run = calling_run(copies, [lambda index=index: called.append(index) for index in range(copies.count)])  # type: ignore[misc]
    assert run() > 0
    assert called == list(itertools.islice(itertools.cycle(range(copies.count)), len(called)))
    assert set(called) == set(range(copies.count))


def test_a_run_of_reads_goes_through_all_bytes() -> None:
    copies = Copies(PARTS, 1000)
    pieces: list[torch.Tensor] = []
    assert reading_run(copies, pieces.append)() > 0
    assert sum(map(len, pieces)) == copies.memory.nbytes


def test_each_round_has_each_run_once_and_all_go_first_in_turn() -> None:
    names: list[str] = []

    def note(name: str) -> float:
        names.append(name)
        return float(len(names))

    times = in_turns({name: lambda name=name: note(name) for name in "abc"}, 0)  # type: ignore[misc]
    rounds = ["".join(names[first : first + 3]) for first in range(0, len(names), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]
    assert times["a"][:3] == [1, 6, 8]
    assert {len(seconds) for seconds in times.values()} == {LEAST_ROUNDS}


@pytest.mark.parametrize(
    ("num_rounds", "spent_s", "enough"),
    [
        (FULL_ROUNDS - 1, 1.0, False),
        (FULL_ROUNDS, 0.99, False),
        (FULL_ROUNDS, 1.0, True),
        (LEAST_ROUNDS, LONG_POINT - 0.01, False),
        (LEAST_ROUNDS, float(LONG_POINT), True),
        (LEAST_ROUNDS - 1, 1000.0, False),
    ],
)
def test_rounds_end_when_there_are_enough_and_their_seconds_are_spent(
    num_rounds: int, spent_s: float, enough: bool
) -> None:
    assert is_enough(num_rounds, spent_s=spent_s, wanted_s=1.0) == enough


def test_a_ratio_is_that_of_rounds_and_not_of_medians() -> None:
    above, below = [2.0, 30.0, 400.0], [1.0, 10.0, 100.0]
    assert median_ratio(above, below) == 3.0
    slow, fast = [1.0, 8.0, 3.0], [2.0, 1.0, 3.0]
    assert median_ratio(slow, fast) == 1.0  # of 0.5, 8 and 1; the ratio of medians is 1.5
