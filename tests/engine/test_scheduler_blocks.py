"""Which sequence gives up its blocks, and which begins behind those of another."""

from __future__ import annotations

import pytest

from service.engine.batch import Failure
from service.engine.sequence import FinishReason
from tests.engine.scheduling import (
    make_scheduler,
    make_sequence,
    outcomes_of,
    shares,
    step,
)

# Too few blocks


def test_the_youngest_gives_up_its_blocks_and_goes_on_where_it_was() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=16)
    for name in "ab":
        scheduler.add(make_sequence(name, 4, 9))
    assert step(scheduler) == [("a", 0, 4), ("b", 0, 4)]
    for position in range(4, 8):
        assert step(scheduler) == [("a", position, 1), ("b", position, 1)]
    batch = scheduler.schedule(2.0)  # the ninth token of "a" needs a third block
    assert batch is not None
    assert (shares(batch), batch.preempted, batch.queue_s) == ([("a", 8, 1)], ("b",), ())
    assert scheduler.commit(batch, outcomes_of(batch), 2.0).num_preempted == 1
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    while scheduler.num_running:
        assert [share[0] for share in step(scheduler)] == ["a"]
    assert step(scheduler) == [("b", 0, 9)], "its five tokens are computed again with its prompt"
    for position in range(9, 12):
        assert step(scheduler) == [("b", position, 1)]
    assert not scheduler.num_running
    events = scheduler.take_events()
    for name in "ab":
        own = [event for event in events if event.request_id == name]
        assert [len(event.token_ids) for event in own] == [1] * 9
        assert own[-1].timings is not None
        assert own[-1].timings.queue_s == 1.0, "the second wait is none in the queue"


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no-cache"])
def test_sequences_of_one_length_end_in_their_order_however_few_blocks_there_are(*, prefix_cache: bool) -> None:
    scheduler = make_scheduler(num_blocks=7, max_num_batched_tokens=32, prefix_cache=prefix_cache)
    names = [str(number) for number in range(8)]
    for name in names:
        sequence = make_sequence(name, 6, 22)
        sequence.submitted_at = float(name)
        scheduler.add(sequence)
    preempted: list[str] = []
    while scheduler.has_work:
        oldest = min(names[8 - scheduler.num_running - scheduler.num_waiting :], default="")
        batch = scheduler.schedule(9.0)
        if batch is not None:
            assert batch.works[0].sequence.request_id == oldest, "the oldest had to wait"
            scheduler.commit(batch, outcomes_of(batch), 9.0)
            preempted += batch.preempted
        scheduler.check_integrity()
        ends = [event.request_id for event in scheduler.take_events() if event.finish_reason]
        assert ends == [oldest][: len(ends)]
    assert len(preempted) > 3


def test_a_waiting_sequence_that_was_sent_back_can_be_aborted() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=16)
    for name in "ab":
        scheduler.add(make_sequence(name, 4, 9))
    for _ in range(6):
        step(scheduler)
    assert scheduler.num_waiting == 1
    scheduler.abort("b", FinishReason.ABORT, 2.0)
    assert scheduler.num_waiting == 0
    assert [event.finish_reason for event in scheduler.take_events() if event.request_id == "b"][-1] == "abort"
    scheduler.check_integrity()


def test_admission_leaves_a_block_for_each_sequence_that_may_grow() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=32)
    scheduler.add(make_sequence("a", 4, 9))
    scheduler.add(make_sequence("b", 8, 9))  # 2 blocks, and 1 left of the 2 that both may need at once
    assert step(scheduler) == [("a", 0, 4)]
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=32)
    scheduler.add(make_sequence("a", 4, 9))
    scheduler.add(make_sequence("b", 8, 1))
    assert step(scheduler) == [("a", 0, 4), ("b", 0, 8)], "one that will not grow needs no room for it"


# Shared prompts


def test_a_prompt_begins_behind_what_the_cache_has() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=32, prefix_cache=True)
    for name, hits in (("a", 0), ("b", 8)):
        scheduler.add(make_sequence(name, 10, 1))
        batch = scheduler.schedule(1.0)
        assert batch is not None
        assert shares(batch) == [(name, hits, 10 - hits)]
        stats = scheduler.commit(batch, outcomes_of(batch), 1.0)
        assert (stats.num_hit_tokens, stats.num_prompt_tokens) == (hits, 10 - hits)


def test_of_prompts_that_begin_alike_the_first_is_computed_and_the_others_wait_for_it() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, prefix_cache=True)
    for name in "abc":
        scheduler.add(make_sequence(name, 14, 2))
    assert step(scheduler) == [("a", 0, 8)]
    assert step(scheduler) == [("a", 8, 6)], "there was room for another"
    assert step(scheduler) == [("a", 14, 1), ("b", 12, 2), ("c", 12, 2)]


@pytest.mark.parametrize("end", ["failure", "abort"])
def test_when_the_first_of_them_fails_the_next_one_is_computed(end: str) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=32, prefix_cache=True)
    for name in "ab":
        scheduler.add(make_sequence(name, 14, 2))
    batch = scheduler.schedule(1.0)
    assert batch is not None
    assert shares(batch) == [("a", 0, 14)]
    if end == "abort":
        scheduler.abort("a", FinishReason.ABORT, 1.0)
    scheduler.commit(batch, outcomes_of(batch, Failure(FinishReason.ERROR, "no")), 1.0)
    assert step(scheduler) == [("b", 0, 14)]


@pytest.mark.parametrize(("prefix_cache", "salt"), [(False, ""), (True, "key")], ids=["no-cache", "other-salt"])
def test_prompts_that_cannot_share_do_not_wait_for_each_other(*, prefix_cache: bool, salt: str) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=32, prefix_cache=prefix_cache)
    first, second = make_sequence("a", 14, 2), make_sequence("b", 14, 2)
    second.cache_salt = salt
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler) == [("a", 0, 14), ("b", 0, 14)]


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.NONFINITE])
def test_nothing_of_a_failed_sequence_is_cached(reason: FinishReason) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, prefix_cache=True)
    scheduler.add(make_sequence("a", 12, 9))
    assert step(scheduler) == [("a", 0, 8)]
    assert step(scheduler) == [("a", 8, 4)]
    assert step(scheduler, Failure(reason, "no")) == [("a", 12, 1)]  # type: ignore[arg-type]
    scheduler.add(make_sequence("b", 12, 9))
    assert step(scheduler) == [("b", 0, 8)]
