"""Which sequences compute which tokens in the next step. No torch.

First come, first served: the head of the queue is never overtaken, and every running sequence came
before every waiting one. A sequence is admitted with the KV blocks of the tokens that it has and gets
more as it grows; when none is left, the youngest running one gives up its blocks and goes back to the
head of the queue, where it keeps its tokens to compute them again. The oldest is never sent back as
long as there is another one, and alone any sequence fits, so the oldest always comes to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TypedDict

from service.engine.batch import Batch, Failure, Intervals, Outcome, Scores, Token, Work, step_stats
from service.engine.block_manager import BlockManager
from service.engine.pacing import StepPacer
from service.engine.sequence import (
    FinishReason,
    Sequence,
    SequenceEvent,
    SequenceStatus,
    SequenceTimings,
    TokenLogprobs,
)
from service.engine.stats import StepStats


class _News(TypedDict, total=False):
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    stop_token: tuple[int, TokenLogprobs]


class Scheduler:
    """Queue, running sequences and their blocks. Not thread-safe: the engine holds its lock around each call.

    At most `min(max_num_seqs, max_num_batched_tokens)` sequences run, so that every step has at
    least one token for each of them and none starves. Without `chunked` a prompt is computed in one
    step, whatever its length; such a step may hold more than `max_num_batched_tokens`, by at most one prompt.
    With `chunk_length` a prompt is cut at multiples of it only, wherever the limits of a step would cut it, so a
    step may be longer by less than one chunk. A `pacer` limits the prompt tokens of steps that also decode. In one
    step at most `max_num_scored` tokens have logits that are kept to score prompts; without `chunked` too such a
    prompt is cut.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunked: bool = True,
        chunk_length: int = 1,
        pacer: StepPacer | None = None,
        max_num_scored: int | None = None,
    ) -> None:
        self._blocks = blocks
        self._max_running = min(max_num_seqs, max_num_batched_tokens)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._chunked = chunked
        self._chunk_length = chunk_length
        self._pacer = pacer
        self._max_num_scored = max_num_scored
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._aborted: dict[str, FinishReason] = {}
        self._events: list[SequenceEvent] = []

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, those that were sent back included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` or `take_events` has something to give."""
        return bool(self._waiting or self._running or self._events)

    def is_queued(self, request_id: str) -> bool:
        """Whether a sequence waits and was never scheduled."""
        return any(s.request_id == request_id and s.scheduled_at is None for s in self._waiting)

    def queue_s(self, now: float) -> float:
        """How long the sequence has waited that is the next to begin; 0 if there is none."""
        return next((now - s.submitted_at for s in self._waiting if s.scheduled_at is None), 0.0)

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
        works, prompts, preempted = self._split()
        limit = self._max_prompt_tokens(len(works))
        for sequence in prompts:
            limit -= self._add_chunk(works, sequence, limit)
        queue_s: list[float] = []
        num_hit_tokens = 0
        while limit > 0 and not preempted and (admitted := self._admit()) is not None:
            if admitted.scheduled_at is None:
                admitted.scheduled_at = now
                queue_s.append(now - admitted.submitted_at)
                num_hit_tokens += admitted.num_computed
            limit -= self._add_chunk(works, admitted, limit)
        return Batch(tuple(works), now, tuple(queue_s), num_hit_tokens, tuple(preempted)) if works else None

    def commit(self, batch: Batch, outcomes: Mapping[str, Outcome], now: float) -> StepStats:
        """Take in what a step computed: `outcomes` by request id, of each work that samples or has failed."""
        intervals = Intervals()
        for work in batch.works:
            sequence = work.sequence
            sequence.num_computed += work.count
            outcome = outcomes.get(sequence.request_id)
            if outcome is None or sequence.request_id in self._aborted:
                continue
            if isinstance(outcome, Failure):
                self._finish(sequence, outcome.reason, now, error=outcome.error)
                continue
            self._blocks.confirm(sequence)
            token = self._score(sequence, outcome) if isinstance(outcome, Scores) else outcome
            if token is not None:
                self._append(sequence, token, now, intervals)
        self._remove_aborted(now)
        stats = step_stats(batch, intervals, now)
        if self._pacer is not None:
            self._pacer.observe(stats)
        return stats

    def take_events(self) -> list[SequenceEvent]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Assert that blocks are held by running sequences only, and that all came in order of submission."""
        self.check_blocks()
        assert all(not sequence.block_table for sequence in self._waiting)
        times = [sequence.submitted_at for sequence in (*self._running, *self._waiting)]
        assert times == sorted(times), "a sequence was overtaken"

    def check_blocks(self) -> None:
        """Assert the same of blocks alone, which `add` and `abort` leave as they are."""
        self._blocks.check_integrity(self._running)

    def _split(self) -> tuple[list[Work], list[Sequence], list[str]]:
        """The next token of each running sequence that decodes, the others, and the request ids of those sent back.

        The oldest come first.
        """
        works: list[Work] = []
        prompts: list[Sequence] = []
        preempted: list[str] = []
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            if len(sequence.token_ids) - sequence.num_computed > 1:
                prompts.append(sequence)
            elif self._blocks.grow(sequence):
                works.append(Work(sequence, sequence.num_computed, 1))
            else:
                preempted.append(self._preempt_youngest())
                continue  # once more, unless it was this one
            index += 1
        return works, prompts, preempted

    def _preempt_youngest(self) -> str:
        assert len(self._running) > 1, "one sequence alone finds no block"
        sequence = self._running.pop()
        self._blocks.release(sequence, is_sound=True)
        sequence.status = SequenceStatus.WAITING
        self._waiting.appendleft(sequence)
        return sequence.request_id

    def _max_prompt_tokens(self, num_decodes: int) -> int:
        """Tokens that prompts may have in a step with so many decodes."""
        limit = self._max_num_batched_tokens - num_decodes
        paced = self._pacer.most_prompt_tokens() if self._pacer is not None and num_decodes else None
        return limit if paced is None else min(limit, paced)

    def _add_chunk(self, works: list[Work], sequence: Sequence, limit: int) -> int:
        """Add what a step computes of a prompt if it may have `limit` more tokens; says how many that are."""
        if limit <= 0:
            return 0
        count = len(sequence.token_ids) - sequence.num_computed
        most = limit if self._chunked else count
        if sequence.num_to_score and self._max_num_scored is not None:
            num_told = max(0, sequence.num_scored - sequence.num_computed)
            most = min(most, num_told + self._max_num_scored - sum(work.num_scored for work in works))
        if most <= 0:
            return 0
        if count > most:
            count = most
            num_left = sequence.num_prompt_tokens - sequence.num_computed
            if count < num_left:
                count = min(num_left, max(1, count // self._chunk_length) * self._chunk_length)
        works.append(Work(sequence, sequence.num_computed, count))
        return count

    def _admit(self) -> Sequence | None:
        """Move the head of the queue to the running ones, if each that may grow finds another block afterwards.

        If a running one computes what the head could share, the head comes when that is done: of many
        prompts that begin alike and come together, the first is computed and the others find it.
        """
        if not self._waiting or len(self._running) >= self._max_running:
            return None
        sequence = self._waiting[0]
        if self._blocks.awaits(sequence, self._running):
            return None
        num_growing = sum(map(self._blocks.may_grow, (*self._running, sequence)))
        if not self._blocks.admit(sequence, num_spare=num_growing if self._running else 0):
            return None
        self._waiting.popleft()
        sequence.status = SequenceStatus.RUNNING
        self._running.append(sequence)
        return sequence

    def _score(self, sequence: Sequence, scores: Scores) -> Token | None:
        sequence.num_scored += len(scores.prompt_logprobs)
        self._events.append(SequenceEvent(request_id=sequence.request_id, prompt_logprobs=scores.prompt_logprobs))
        return scores.token

    def _append(self, sequence: Sequence, token: Token, now: float, intervals: Intervals) -> None:
        if sequence.params.max_tokens == 0:  # finite logits were seen, and nobody wants the token
            self._finish(sequence, FinishReason.LENGTH, now)
            return
        sequence.token_ids.append(token.token_id)
        if sequence.first_token_at is None or sequence.last_token_at is None:
            sequence.first_token_at = now
            intervals.first_token_s.append(now - sequence.submitted_at)
        else:
            intervals.inter_token_s.append(now - sequence.last_token_at)
        sequence.last_token_at = now
        if token.token_id in sequence.params.stop_token_ids:
            self._finish(sequence, FinishReason.STOP, now, token=token)
        elif sequence.num_generated == sequence.params.max_tokens:
            self._finish(sequence, FinishReason.LENGTH, now, token=token)
        else:
            logprobs = () if token.logprobs is None else (token.logprobs,)
            self._events.append(SequenceEvent(sequence.request_id, (token.token_id,), logprobs))

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
        token: Token | None = None,
        error: str | None = None,
    ) -> None:
        """Add the one terminal event, then free the blocks: it comes even if something is wrong with these."""
        was_running = sequence.status is SequenceStatus.RUNNING
        if was_running:
            self._running.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self._events.append(
            SequenceEvent(
                request_id=sequence.request_id,
                finish_reason=reason,
                error=error,
                timings=_timings(sequence, now),
                **_news(token, is_stop=reason is FinishReason.STOP),
            )
        )
        if was_running:
            is_sound = reason not in (FinishReason.ERROR, FinishReason.NONFINITE)
            self._blocks.release(sequence, is_sound=is_sound)


def _news(token: Token | None, *, is_stop: bool = False) -> _News:
    """The fields of an event that tell of a token."""
    if token is None:
        return {}
    if is_stop:
        return {} if token.logprobs is None else {"stop_token": (token.token_id, token.logprobs)}
    return {"token_ids": (token.token_id,), "logprobs": () if token.logprobs is None else (token.logprobs,)}


def _timings(sequence: Sequence, now: float) -> SequenceTimings:
    start = sequence.submitted_at
    return SequenceTimings(
        queue_s=None if sequence.scheduled_at is None else sequence.scheduled_at - start,
        first_token_s=None if sequence.first_token_at is None else sequence.first_token_at - start,
        total_s=now - start,
    )
