"""Runs that take turns, over copies of a weight that no cache holds.

A *run* is as many calls as take `RUN_S`. Call by call it goes on to the next copy, so that all of the footprint lies
between two uses of one. A *round* has each run once, so that all of a round meet the machine in the same state.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Final

import torch
from torch import Tensor

RUN_S: Final = 2e-3
READ_RUN_BYTES: Final = 32 << 20
FULL_ROUNDS: Final = 9
LEAST_ROUNDS: Final = 5
LONG_POINT: Final = 4
"""`LEAST_ROUNDS` are enough where they take so many times the seconds that were meant to be spent."""

_ALIGNMENT = 64  # bytes; that of torch's own allocations

Run = Callable[[], float]
"""Makes some calls and returns the mean seconds of one."""


class Copies:
    """Copies of some tensors side by side in one ordinary allocation, handed out in turn.

    Args:
        parts: what a copy consists of.
        footprint_bytes: at least so many bytes of copies are made, and at least two copies.

    Attributes:
        num_bytes: of one copy, without what lies between parts.
        parts: those of each copy, views of `memory`.
    """

    def __init__(self, parts: Sequence[Tensor], footprint_bytes: int) -> None:
        self.num_bytes = sum(part.nbytes for part in parts)
        sizes = [-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts]
        self._stride = sum(sizes)
        self.count = max(2, -(-footprint_bytes // self._stride))
        self.memory = torch.zeros(self.count * self._stride, dtype=torch.uint8)
        offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.parts = [
            [self._place(first + offset, part) for offset, part in zip(offsets, parts, strict=True)]
            for first in range(0, self.memory.nbytes, self._stride)
        ]
        self._next = 0

    def _place(self, start: int, part: Tensor) -> Tensor:
        place = self.memory[start : start + part.nbytes].view(part.dtype).view(part.shape)
        return place.copy_(part)

    def take(self, count: int) -> list[int]:
        """Numbers of the next copies."""
        first, self._next = self._next, (self._next + count) % self.count
        return [index % self.count for index in range(first, first + count)]

    def take_bytes(self, count: int) -> list[Tensor]:
        """The next copies as bytes, in one piece or in two; of more than there are, all."""
        first, count = self._next, min(count, self.count)
        self._next = (first + count) % self.count
        wrapped = max(0, first + count - self.count)
        pieces = ((first, first + count - wrapped), (0, wrapped))
        return [self.memory[start * self._stride : end * self._stride] for start, end in pieces if start < end]


def reading_run(copies: Copies, read: Callable[[Tensor], object]) -> Run:
    """A run that reads copies; it returns seconds for the bytes of one. Longer pieces hide what a call costs."""
    count = max(1, round(READ_RUN_BYTES / copies.num_bytes))

    def run() -> float:
        pieces = copies.take_bytes(count)
        seconds = seconds_of([lambda piece=piece: read(piece) for piece in pieces])  # type: ignore[misc]
        return seconds * copies.num_bytes / sum(piece.nbytes for piece in pieces)

    return run


def calling_run(copies: Copies, calls: Sequence[Callable[[], object]]) -> Run:
    """A run of some of `calls`, one of which there is for each copy.

    The first calls, which may have things to set up, are made here, and tell how many take `RUN_S`.
    """

    def run(count: int) -> float:
        return seconds_of([calls[index] for index in copies.take(count)]) / count

    first_s, second_s = run(1), run(1)
    once_s = second_s if first_s > 10 * RUN_S else min(second_s, run(1), run(1))  # the least is the least disturbed
    return partial(run, max(1, round(RUN_S / once_s)))


def seconds_of(calls: Iterable[Callable[[], object]]) -> float:
    """Seconds that all calls take, one after the other."""
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started


def in_turns(runs: Mapping[str, Run], wanted_s: float) -> dict[str, list[float]]:
    """What each run returned in each round; the first of one round is the last of the next."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    started = time.perf_counter()
    for num_rounds in itertools.count(1):
        for name in order:
            times[name].append(runs[name]())
        order.append(order.pop(0))
        if is_enough(num_rounds, spent_s=time.perf_counter() - started, wanted_s=wanted_s):
            break
    return times


def is_enough(num_rounds: int, *, spent_s: float, wanted_s: float) -> bool:
    """Whether so many rounds are, which took `spent_s`."""
    if num_rounds >= FULL_ROUNDS:
        return spent_s >= wanted_s
    return num_rounds >= LEAST_ROUNDS and spent_s >= LONG_POINT * wanted_s


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of each round."""
    return median(a / b for a, b in zip(above, below, strict=True))
