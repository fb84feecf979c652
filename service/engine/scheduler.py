"""Which sequences compute which tokens in the next step. No torch.

First come, first served: the head of the queue is never overtaken. All blocks that a sequence can
ever need are reserved when it is admitted, so that a running one never waits for memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from service.engine.allocator import BlockAllocator
from service.engine.sequence import (
    FinishReason,
    Sequence,
    SequenceEvent,
    SequenceStatus,
    SequenceTimings,
)
from service.engine.stats import StepStats


@dataclass(frozen=True, slots=True)
class Work:
    """The share of one sequence in a step: `count` tokens from `position` on."""

    sequence: Sequence
    position: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the next token can be sampled after this work."""
        return self.position + self.count == len(self.sequence.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """How many of the tokens belong to the prompt."""
        return max(0, min(self.count, self.sequence.num_prompt_tokens - self.position))


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes, decodes first.

    Attributes:
        queue_s: for each sequence first scheduled here, seconds since submit.
    """

    works: tuple[Work, ...]
    started_at: float
    queue_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sequence has no next token: ERROR or NONFINITE, and the text for the client."""

    reason: Literal[FinishReason.ERROR, FinishReason.NONFINITE]
    error: str


Outcome = int | Failure
"""What a step made of one sequence: its next token, or a failure."""


@dataclass(slots=True)
class _Intervals:
    inter_token_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)


class Scheduler:
    """Queue, running sequences and their blocks. Not thread-safe: the engine holds its lock around each call.

    At most `min(max_num_seqs, max_num_batched_tokens)` sequences run, so that every step has at
    least one token for each of them and none starves. Without `chunked` a prompt is computed in one
    step, whatever its length; such a step may hold more than `max_num_batched_tokens`, by at most one prompt.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunked: bool = True,
    ) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._max_running = min(max_num_seqs, max_num_batched_tokens)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._chunked = chunked
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._aborted: dict[str, FinishReason] = {}
        self._events: list[SequenceEvent] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that were never scheduled."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` or `take_events` has something to give."""
        return bool(self._waiting or self._running or self._events)

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return math.ceil(num_tokens / self._block_size)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue; it must fit the KV blocks when it is alone."""
        self._waiting.append(sequence)

    def abort(self, request_id: str, reason: FinishReason, now: float) -> None:
        """End a sequence: a waiting one at once, a running one by the next `schedule` or `commit`.

        An unknown one is left alone, and so is the reason of one that is already aborted.
        """
        for sequence in self._waiting:
            if sequence.request_id == request_id:
                self._waiting.remove(sequence)
                self._finish(sequence, reason, now)
                return
        if any(sequence.request_id == request_id for sequence in self._running):
            self._aborted.setdefault(request_id, reason)

    def abort_all(self, reason: FinishReason, now: float) -> None:
        """Abort every sequence."""
        for sequence in (*self._waiting, *self._running):
            self.abort(sequence.request_id, reason, now)

    def schedule(self, now: float) -> Batch | None:
        """Choose the next step: a token for each decoding sequence, then prompt chunks, then admissions.

        None if there is nothing to compute.
        """
        self._remove_aborted(now)
        decoding = [sequence for sequence in self._running if _num_uncomputed(sequence) == 1]
        works = [Work(sequence, sequence.num_computed, 1) for sequence in decoding]
        budget = self._max_num_batched_tokens - len(works)
        prefilling = [sequence for sequence in self._running if _num_uncomputed(sequence) > 1]
        for sequence in prefilling:
            budget -= self._add_chunk(works, sequence, budget)
        queue_s = []
        while budget > 0 and (admitted := self._admit(now)) is not None:
            budget -= self._add_chunk(works, admitted, budget)
            queue_s.append(now - admitted.submitted_at)
        return Batch(tuple(works), now, tuple(queue_s)) if works else None

    def commit(self, batch: Batch, outcomes: Mapping[str, Outcome], now: float) -> StepStats:
        """Take in what a step computed: `outcomes` by request id, of each work that samples or has failed."""
        intervals = _Intervals()
        for work in batch.works:
            sequence = work.sequence
            sequence.num_computed += work.count
            outcome = outcomes.get(sequence.request_id)
            if sequence.request_id in self._aborted or outcome is None:
                continue
            if isinstance(outcome, Failure):
                self._finish(sequence, outcome.reason, now, error=outcome.error)
            else:
                self._append(sequence, outcome, now, intervals)
        self._remove_aborted(now)
        return _step_stats(batch, outcomes, intervals, now)

    def take_events(self) -> list[SequenceEvent]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Assert that each block in use belongs to exactly one running sequence."""
        self._allocator.check_integrity(block for sequence in self._running for block in sequence.block_table)
        assert all(not sequence.block_table for sequence in self._waiting)

    def _add_chunk(self, works: list[Work], sequence: Sequence, budget: int) -> int:
        count = _num_uncomputed(sequence)
        if self._chunked:
            count = min(count, budget)
        if count > 0:
            works.append(Work(sequence, sequence.num_computed, count))
        return count

    def _admit(self, now: float) -> Sequence | None:
        """Move the head of the queue to the running ones if there is room for all of it."""
        if not self._waiting or len(self._running) >= self._max_running:
            return None
        sequence = self._waiting[0]
        num_blocks = self.num_blocks_of(sequence.num_prompt_tokens + sequence.params.max_tokens)
        if num_blocks > self._allocator.num_free:
            return None
        self._waiting.popleft()
        sequence.block_table = self._allocator.allocate(num_blocks)
        sequence.status = SequenceStatus.RUNNING
        sequence.scheduled_at = now
        self._running.append(sequence)
        return sequence

    def _append(self, sequence: Sequence, token_id: int, now: float, intervals: _Intervals) -> None:
        sequence.token_ids.append(token_id)
        if sequence.first_token_at is None or sequence.last_token_at is None:
            sequence.first_token_at = now
            intervals.first_token_s.append(now - sequence.submitted_at)
        else:
            intervals.inter_token_s.append(now - sequence.last_token_at)
        sequence.last_token_at = now
        if token_id in sequence.params.stop_token_ids:
            self._finish(sequence, FinishReason.STOP, now)
        elif sequence.num_generated == sequence.params.max_tokens:
            self._finish(sequence, FinishReason.LENGTH, now, token_ids=(token_id,))
        else:
            self._events.append(SequenceEvent(request_id=sequence.request_id, token_ids=(token_id,)))

    def _remove_aborted(self, now: float) -> None:
        if self._aborted:
            for sequence in [s for s in self._running if s.request_id in self._aborted]:
                self._finish(sequence, self._aborted[sequence.request_id], now)
            self._aborted.clear()

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        *,
        token_ids: tuple[int, ...] = (),
        error: str | None = None,
    ) -> None:
        """Free the blocks and add the one terminal event."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._allocator.free(sequence.block_table)
            sequence.block_table = []
        sequence.status = SequenceStatus.FINISHED
        self._events.append(
            SequenceEvent(
                request_id=sequence.request_id,
                token_ids=token_ids,
                finish_reason=reason,
                error=error,
                timings=_timings(sequence, now),
            )
        )


def _num_uncomputed(sequence: Sequence) -> int:
    return len(sequence.token_ids) - sequence.num_computed


def _timings(sequence: Sequence, now: float) -> SequenceTimings:
    start = sequence.submitted_at
    return SequenceTimings(
        queue_s=None if sequence.scheduled_at is None else sequence.scheduled_at - start,
        first_token_s=None if sequence.first_token_at is None else sequence.first_token_at - start,
        total_s=now - start,
    )


def _step_stats(batch: Batch, outcomes: Mapping[str, Outcome], intervals: _Intervals, now: float) -> StepStats:
    num_tokens = sum(work.count for work in batch.works)
    num_prompt_tokens = sum(work.num_prompt_tokens for work in batch.works)
    kind: Literal["prefill", "decode", "mixed"] = "mixed"
    if num_prompt_tokens in (0, num_tokens):
        kind = "prefill" if num_prompt_tokens else "decode"
    return StepStats(
        kind=kind,
        seconds=now - batch.started_at,
        num_sequences=len(batch.works),
        num_tokens=num_tokens,
        num_prompt_tokens=num_prompt_tokens,
        num_sampled=sum(isinstance(outcome, int) for outcome in outcomes.values()),
        inter_token_s=tuple(intervals.inter_token_s),
        first_token_s=tuple(intervals.first_token_s),
        queue_s=batch.queue_s,
    )
