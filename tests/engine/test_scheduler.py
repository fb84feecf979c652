from __future__ import annotations

import subprocess
import sys

import pytest

from service.engine.batch import Failure, Outcome, Token
from service.engine.pacing import StepPacer
from service.engine.sequence import FinishReason, SequenceStatus, TokenLogprobs
from tests.engine.scheduling import (
    BLOCK_SIZE,
    ERROR,
    ONE,
    STOP,
    make_scheduler,
    make_sequence,
    outcomes_of,
    shares,
    step,
)


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
    [(STOP, FinishReason.STOP, ()), (ONE, FinishReason.LENGTH, (1,)), (ERROR, FinishReason.ERROR, ())],
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


@pytest.mark.parametrize("num_steps", [1, 2, 4], ids=["mid-prefill", "prompt-done", "decoding"])
def test_the_next_step_has_the_blocks_of_a_sequence_that_was_aborted(num_steps: int) -> None:
    scheduler = make_scheduler(num_blocks=5, max_num_batched_tokens=8)
    scheduler.add(make_sequence("a", 12, 8))
    scheduler.add(make_sequence("b", 12, 8))
    for _ in range(num_steps):
        assert [share[0] for share in step(scheduler)] == ["a"], "there is no room for both"
    scheduler.abort("a", FinishReason.ABORT, 2.0)
    assert step(scheduler) == [("b", 0, 8)]
    ends = [event for event in scheduler.take_events() if event.finish_reason is not None]
    assert [(event.request_id, event.finish_reason) for event in ends] == [("a", FinishReason.ABORT)]


def test_an_abort_while_the_last_token_is_computed_makes_one_end() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", max_tokens=1))
    batch = scheduler.schedule(1.0)
    assert batch is not None
    scheduler.abort("a", FinishReason.ABORT, 1.0)
    scheduler.commit(batch, outcomes_of(batch), 2.0)
    scheduler.abort("a", FinishReason.TIMEOUT, 3.0)
    assert scheduler.schedule(4.0) is None
    assert [event.finish_reason for event in scheduler.take_events()] == [FinishReason.ABORT]


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
    assert (first.num_tokens, first.num_prompt_tokens, first.num_sequences) == (4, 4, 2)
    assert (first.queue_s, first.first_token_s, first.inter_token_s) == ((1.0, 1.0), (1.5,), ())
    assert (second.num_tokens, second.num_prompt_tokens) == (3, 2)
    assert (second.first_token_s, second.inter_token_s, second.seconds) == ((2.5,), (1.0,), 0.5)
    assert third.inter_token_s == (2.0, 2.0)


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, service.engine.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("max_tokens", [1, 2], ids=["last", "not-last"])
def test_log_probabilities_travel_with_their_token(max_tokens: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 3, max_tokens))
    logprobs = TokenLogprobs(-0.5, ((1, -0.5),))
    step(scheduler, Token(1, logprobs))
    (event,) = scheduler.take_events()
    assert (event.token_ids, event.logprobs) == ((1,), (logprobs,))


# Prompts beside decodes


def timed_chunks(pacer: StepPacer | None, num_prompt_tokens: int = 600) -> list[tuple[int, float]]:
    """Prompt tokens and seconds of the steps of a long prompt beside a decode: 10 ms, and 1 ms for each token."""
    scheduler = make_scheduler(num_blocks=400, max_num_batched_tokens=512, pacer=pacer)
    scheduler.add(make_sequence("decodes", 100, 500))
    found = []
    now = 0.0
    for number in range(60):
        if number == 10:
            scheduler.add(make_sequence("prompt", num_prompt_tokens, 500))
        batch = scheduler.schedule(now)
        assert batch is not None
        count = sum(work.count for work in batch.works if work.position < work.sequence.num_prompt_tokens)
        now += 0.010 + 0.001 * count
        stats = scheduler.commit(batch, outcomes_of(batch), now)
        if number >= 10 and count:
            found.append((count, stats.seconds))
    assert sum(count for count, _ in found) == num_prompt_tokens
    return found


def test_a_prompt_prolongs_steps_that_decode_by_the_budget_however_long_it_is() -> None:
    found = timed_chunks(StepPacer(0.050, least_tokens=BLOCK_SIZE))
    assert max(seconds for _, seconds in found) <= 0.010 + 0.050
    assert [count for count, _ in found[5:-1]] == pytest.approx([50] * len(found[5:-1]), abs=2)


def test_without_a_pacer_a_prompt_takes_all_tokens_of_a_step() -> None:
    assert [count for count, _ in timed_chunks(None)] == [511, 89]


def test_a_prompt_beside_decodes_gets_a_block_of_tokens_in_any_case() -> None:
    found = timed_chunks(StepPacer(0.001, least_tokens=BLOCK_SIZE), num_prompt_tokens=120)
    assert [count for count, _ in found] == [BLOCK_SIZE] * 30


def test_a_prompt_alone_takes_all_tokens_of_a_step() -> None:
    pacer = StepPacer(0.001, least_tokens=BLOCK_SIZE)
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=64, pacer=pacer)
    for name in "ab":
        scheduler.add(make_sequence(name, 100, 1))
        batch = scheduler.schedule(0.0)
        assert batch is not None
        assert shares(batch) == [(name, 0, 64)]
        scheduler.commit(batch, {}, 9.0)
        scheduler.abort(name, FinishReason.ABORT, 9.0)


def test_what_was_never_scheduled_is_queued_and_tells_how_long_the_queue_takes() -> None:
    scheduler = make_scheduler(num_blocks=3)
    for submitted_at, name in enumerate("abc"):
        sequence = make_sequence(name, 4, 9)
        sequence.submitted_at = float(submitted_at)
        scheduler.add(sequence)
    assert scheduler.queue_s(10) == 10
    step(scheduler, now=10)
    assert [scheduler.is_queued(name) for name in "abc"] == [False, True, True]
    assert scheduler.queue_s(10) == 9
    scheduler.abort("b", FinishReason.TIMEOUT, 10)
    assert scheduler.queue_s(10) == 8
    scheduler.abort("c", FinishReason.TIMEOUT, 10)
    assert scheduler.queue_s(10) == 0


def test_a_sequence_that_was_sent_back_is_not_queued() -> None:
    scheduler = make_scheduler(num_blocks=4)
    for name in "ab":
        scheduler.add(make_sequence(name, 4, 9))
    step(scheduler)
    while scheduler.num_waiting == 0:
        step(scheduler)
    assert not scheduler.is_queued("b")
    assert scheduler.queue_s(10) == 0
