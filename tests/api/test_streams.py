"""How events cross from the engine to requests: at once for streams, together for whole answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from service.api.choices import join_events
from service.api.streams import MOST_PATIENT, EventRouter, Inbox
from service.engine.sequence import FinishReason, SequenceEvent, TokenLogprobs


def _event(token_id: int, *, request_id: str = "a", ends: bool = False) -> SequenceEvent:
    reason = FinishReason.LENGTH if ends else None
    return SequenceEvent(request_id=request_id, token_ids=(token_id,), finish_reason=reason)


def _sizes_of_reads(steps: Sequence[Sequence[SequenceEvent]], *, is_patient: bool) -> list[int]:
    """How many events each wake-up brings of the sequence `a`, whose inbox may be patient; others wait for `b`."""

    async def read() -> list[int]:
        router = EventRouter(asyncio.get_running_loop())
        inbox, other = Inbox(on_overflow=lambda: None), Inbox(on_overflow=lambda: None)
        inbox.is_patient = is_patient
        router.open("a", inbox)
        router.open("b", other)
        sizes = []
        reader = asyncio.create_task(inbox.take())
        for step in steps:
            await asyncio.to_thread(router.deliver, step)
            for _ in range(3):  # turns of the event loop: dispatch, wake-up, read
                await asyncio.sleep(0)
            if reader.done():
                sizes.append(len(reader.result()))
                reader = asyncio.create_task(inbox.take())
                await asyncio.sleep(0)
        reader.cancel()
        return sizes

    return asyncio.run(read())


STEPS = [[_event(token_id)] for token_id in range(4)]
END = [[_event(4, ends=True)]]


@pytest.mark.parametrize(
    ("is_patient", "sizes"), [(False, [1, 1, 1, 1, 1]), (True, [5])], ids=["a stream", "a whole answer"]
)
def test_who_waits_for_the_end_is_woken_once(is_patient: bool, sizes: list[int]) -> None:
    assert _sizes_of_reads(STEPS + END, is_patient=is_patient) == sizes


def test_who_is_patient_does_not_let_more_wait_than_is_allowed() -> None:
    steps = [[_event(token_id)] for token_id in range(2 * MOST_PATIENT)]
    assert _sizes_of_reads(steps, is_patient=True) == [MOST_PATIENT, MOST_PATIENT]


def test_events_that_waited_stay_in_order_when_another_request_hurries() -> None:
    async def read() -> list[tuple[int, ...]]:
        router = EventRouter(asyncio.get_running_loop())
        inbox, stream = Inbox(on_overflow=lambda: None), Inbox(on_overflow=lambda: None)
        inbox.is_patient = True
        router.open("a", inbox)
        router.open("b", stream)
        router.deliver([_event(1)])
        router.deliver([_event(2), _event(3, request_id="b")])
        router.deliver([_event(4, ends=True)])
        assert [event.token_ids for event in await stream.take()] == [(3,)]
        return [event.token_ids for event in await inbox.take()]

    assert asyncio.run(read()) == [(1,), (2,), (4,)]


def test_events_of_a_sequence_become_one_with_its_end() -> None:
    events = [_event(1), _event(2, request_id="b"), _event(3), _event(4, request_id="b", ends=True)]
    assert join_events(events) == [
        SequenceEvent(request_id="a", token_ids=(1, 3)),
        SequenceEvent(request_id="b", token_ids=(2, 4), finish_reason=FinishReason.LENGTH),
    ]


def test_events_with_scores_stay_apart() -> None:
    scored = [_event(1)._replace(logprobs=(TokenLogprobs(-1.0, ()),)), _event(2)]
    assert join_events(scored) == scored
