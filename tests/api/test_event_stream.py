"""Where the events of a stream are written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from service.api.choices import Delta
from service.api.event_stream import EventStream
from service.api.generation import Generation
from service.api.logprobs import TokenScore


class _Closable:
    """What a stream wants of a generation at its end."""

    num_closed = 0

    def close(self) -> None:
        self.num_closed += 1


def _delta(num_scores: int) -> Delta:
    return Delta(index=0, prompt_scores=(TokenScore(1, 0, None),) * num_scores)


@pytest.mark.parametrize(("num_scores", "is_elsewhere"), [(0, False), (1, False), (512, True)])
def test_many_scores_are_written_off_the_event_loop(num_scores: int, is_elsewhere: bool) -> None:
    threads: list[int] = []
    sent: list[Any] = []
    generation = _Closable()

    def render(deltas: list[Delta]) -> bytes:
        threads.append(threading.get_ident())
        return b"data: %d\n\n" % len(deltas)

    async def later() -> AsyncIterator[list[Delta]]:
        yield [_delta(num_scores)]

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    async def receive() -> Any:
        raise AssertionError

    stream = EventStream(
        cast(Generation, generation), later(), first=[_delta(num_scores)], render=render, last_event=lambda: b""
    )
    asyncio.run(stream({"type": "http"}, receive, send))
    assert [thread != threading.get_ident() for thread in threads] == [is_elsewhere] * 2
    assert sent[1:] == [b"data: 1\n\n", b"data: 1\n\n", b"data: [DONE]\n\n"]
    assert generation.num_closed == 1
