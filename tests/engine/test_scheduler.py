from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.engine.allocator import BlockAllocator
from service.engine.scheduler import Batch, Failure, Outcome, Scheduler
from service.engine.sequence import FinishReason, SamplingParams, Sequence, SequenceStatus

BLOCK_SIZE = 4
STOP_TOKEN = 9
ERROR = Failure(FinishReason.ERROR, "ValueError: no")


def make_scheduler(
    num_blocks: int = 16, *, max_num_seqs: int = 4, max_num_batched_tokens: int = 8, chunked: bool = True
) -> Scheduler:
    return Scheduler(
        BlockAllocator(num_blocks),
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        chunked=chunked,
    )


def make_sequence(request_id: str, num_prompt_tokens: int = 3, max_tokens: int = 2) -> Sequence:
    return Sequence(
        request_id=request_id,
        token_ids=[1] * num_prompt_tokens,
        num_prompt_tokens=num_prompt_tokens,
        params=SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({STOP_TOKEN})),
        submitted_at=0.0,
    )


def shares(batch: Batch | None) -> list[tuple[str, int, int]]:
    assert batch is not None
    return [(work.sequence.request_id, work.position, work.count) for work in batch.works]


def outcomes_of(batch: Batch, token: Outcome = 1) -> dict[str, Outcome]:
    return {work.sequence.request_id: token for work in batch.works if work.samples}


def step(scheduler: Scheduler, token: Outcome = 1, now: float = 1.0) -> list[tuple[str, int, int]]:
    batch = scheduler.schedule(now)
    assert batch is not None
    scheduler.commit(batch, outcomes_of(batch, token), now)
    return shares(batch)


def test_decodes_come_first_and_prompts_share_the_rest() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_sequence("a", 5, 9))
    scheduler.add(make_sequence("b", 6, 9))
    scheduler.add(make_sequence("c", 2, 9))
    assert step(scheduler) == [("a", 0, 5), ("b", 0, 3)]
    assert step(scheduler) == [("a", 5, 1), ("b", 3, 3), ("c", 0, 2)]
    assert step(scheduler) == [("a", 6, 1), ("b", 6, 1), ("c", 2, 1)]


def test_the_head_of_the_queue_is_never_overtaken() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_sequence("a", 4, 4))
    scheduler.add(make_sequence("big", 8, 8))
    scheduler.add(make_sequence("small", 1, 1))
    assert step(scheduler) == [("a", 0, 4)]
    assert scheduler.num_waiting == 2
    while scheduler.num_running:
        assert [share[0] for share in step(scheduler)] == ["a"]
    assert step(scheduler) == [("big", 0, 8)]


def test_a_step_has_a_token_for_each_running_sequence() -> None:
    scheduler = make_scheduler(max_num_seqs=4, max_num_batched_tokens=2)
    for name in "abc":
        scheduler.add(make_sequence(name, 3, 3))
    for _ in range(6):
        step(scheduler)
        assert scheduler.num_running <= 2


def test_a_whole_prompt_is_computed_in_one_step_however_long_it_is() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4, chunked=False)
    for name, num_prompt_tokens in (("a", 3), ("b", 9), ("c", 2)):
        scheduler.add(make_sequence(name, num_prompt_tokens, 5))
    assert step(scheduler) == [("a", 0, 3), ("b", 0, 9)]
    assert step(scheduler) == [("a", 3, 1), ("b", 9, 1), ("c", 0, 2)]


@pytest.mark.parametrize(
    ("token", "reason", "delivered"),
    [(STOP_TOKEN, FinishReason.STOP, ()), (1, FinishReason.LENGTH, (1,)), (ERROR, FinishReason.ERROR, ())],
    ids=["stop-token-is-kept-back", "length", "failure"],
)
def test_the_terminal_event_says_how_it_ended(token: Outcome, reason: FinishReason, delivered: tuple[int, ...]) -> None:
    scheduler = make_scheduler()
    sequence = make_sequence("a", max_tokens=1)
    scheduler.add(sequence)
    step(scheduler, token, now=5.0)
    (event,) = scheduler.take_events()
    assert (event.finish_reason, event.token_ids) == (reason, delivered)
    assert event.error == (ERROR.error if isinstance(token, Failure) else None)
    assert event.timings is not None
    assert (event.timings.queue_s, event.timings.total_s) == (5.0, 5.0)
    assert sequence.status is SequenceStatus.FINISHED
    assert not scheduler.has_work


def test_an_abort_during_a_step_discards_its_token_and_frees_its_blocks() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", max_tokens=9))
    batch = scheduler.schedule(1.0)
    assert batch is not None
    scheduler.abort("a", FinishReason.TIMEOUT, 1.0)
    scheduler.abort("a", FinishReason.ABORT, 1.0)
    scheduler.commit(batch, outcomes_of(batch), 2.0)
    (event,) = scheduler.take_events()
    assert (event.finish_reason, event.token_ids) == (FinishReason.TIMEOUT, ())
    scheduler.check_integrity()
    assert scheduler.schedule(3.0) is None


def test_a_waiting_sequence_that_is_aborted_has_no_queue_time() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a"))
    scheduler.abort("a", FinishReason.ABORT, 2.0)
    (event,) = scheduler.take_events()
    assert event.timings is not None
    assert (event.timings.queue_s, event.timings.first_token_s, event.timings.total_s) == (None, None, 2.0)


def test_step_stats_count_tokens_and_intervals() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    scheduler.add(make_sequence("a", 3, 9))
    scheduler.add(make_sequence("b", 3, 9))
    stats = []
    for started_at in (1.0, 2.0, 4.0):
        batch = scheduler.schedule(started_at)
        assert batch is not None
        stats.append(scheduler.commit(batch, outcomes_of(batch), started_at + 0.5))
    first, second, third = stats
    assert [s.kind for s in stats] == ["prefill", "mixed", "decode"]
    assert (first.num_tokens, first.num_prompt_tokens, first.num_sampled, first.num_sequences) == (4, 4, 1, 2)
    assert (first.queue_s, first.first_token_s, first.inter_token_s) == ((1.0, 1.0), (1.5,), ())
    assert (second.num_tokens, second.num_prompt_tokens, second.num_sampled) == (3, 2, 2)
    assert (second.first_token_s, second.inter_token_s, second.seconds) == ((2.5,), (1.0,), 0.5)
    assert third.inter_token_s == (2.0, 2.0)


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, service.engine.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of submit, abort, schedule and commit."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(num_blocks=8, max_num_seqs=3, max_num_batched_tokens=5)
        self.sequences: dict[str, Sequence] = {}
        self.ended: dict[str, FinishReason] = {}
        self.started: list[str] = []
        self.batch: Batch | None = None
        self.now = 0.0

    @rule(num_prompt_tokens=st.integers(1, 16), max_tokens=st.integers(1, 16))
    def submit(self, num_prompt_tokens: int, max_tokens: int) -> None:
        sequence = make_sequence(str(len(self.sequences)), num_prompt_tokens, max_tokens)
        self.sequences[sequence.request_id] = sequence
        self.scheduler.add(sequence)

    @rule(number=st.integers(0, 60), reason=st.sampled_from([FinishReason.ABORT, FinishReason.TIMEOUT]))
    def abort(self, number: int, reason: FinishReason) -> None:
        self.scheduler.abort(str(number), reason, self.now)

    @precondition(lambda self: self.batch is None)
    @rule()
    def schedule(self) -> None:
        self.now += 1
        self.batch = self.scheduler.schedule(self.now)
        if self.batch is None:
            return
        assert 1 <= sum(work.count for work in self.batch.works) <= 5
        for work in self.batch.works:
            sequence = work.sequence
            last_slot = work.position + work.count - 1
            assert work.position == sequence.num_computed
            assert last_slot // BLOCK_SIZE < len(sequence.block_table), "a token has no block"
            if sequence.scheduled_at == self.now:
                self.started.append(sequence.request_id)

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        assert self.batch is not None
        choices: list[Outcome] = [1, 2, STOP_TOKEN, ERROR]
        outcomes: dict[str, Outcome] = {}
        for work in self.batch.works:
            outcome = data.draw(st.sampled_from(choices))
            if work.samples or isinstance(outcome, Failure):
                outcomes[work.sequence.request_id] = outcome
        self.scheduler.commit(self.batch, outcomes, self.now)
        self.batch = None

    @rule()
    def take_events(self) -> None:
        for event in self.scheduler.take_events():
            assert event.request_id not in self.ended, "an event after the terminal one"
            if event.finish_reason is not None:
                self.ended[event.request_id] = event.finish_reason
                assert not self.sequences[event.request_id].block_table

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.scheduler.check_integrity()

    @invariant()
    def nobody_is_overtaken(self) -> None:
        assert self.started == sorted(self.started, key=int)

    def teardown(self) -> None:
        """Whatever happened, all accepted sequences end."""
        for _ in range(1000):
            if self.batch is not None:
                self.scheduler.commit(self.batch, outcomes_of(self.batch), self.now)
                self.batch = None
            self.take_events()
            if not self.scheduler.has_work:
                break
            self.schedule()
        assert self.ended.keys() == self.sequences.keys()
        self.scheduler.check_integrity()


TestAnyInterleaving = SchedulerMachine.TestCase
TestAnyInterleaving.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
