"""Server-sent events: how a generation is streamed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.choices import Delta
from service.api.errors import ClientDisconnected, error_bytes, internal_error
from service.api.generation import Generation
from service.errors import RequestError

logger = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"
_MOST_SCORES_AT_ONCE = 32
"""Log-probabilities of so many tokens are written on the event loop, in 1 ms at most; more on a thread."""
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Server-sent events of a generation, ended by `[DONE]`; a failure is an event before it.

    Args:
        first: deltas that were already read, so that a failure before them could be an HTTP status.
        render: makes the events of some deltas.
        last_event: makes an event that follows all others; b"" for none.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        deltas: AsyncIterator[list[Delta]],
        *,
        first: list[Delta],
        render: Callable[[list[Delta]], bytes],
        last_event: Callable[[], bytes],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(_STREAM_HEADERS)
        self._generation = generation
        self._deltas = deltas
        self._first = first
        self._render = render
        self._last_event = last_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await self._write(send)
                end = self._last_event()
            except RequestError as error:
                end = b"data: %b\n\n" % error_bytes(error)
            except ClientDisconnected:
                return
            except Exception:
                logger.exception("a stream failed")
                end = b"data: %b\n\n" % error_bytes(internal_error())
            await send({"type": "http.response.body", "body": end + _DONE})
        finally:
            self._generation.close()

    async def _write(self, send: Send) -> None:
        await self._write_events(self._first, send)
        async for deltas in self._deltas:
            await self._write_events(deltas, send)

    async def _write_events(self, deltas: list[Delta], send: Send) -> None:
        num_scores = sum(len(delta.prompt_scores) + len(delta.scores) for delta in deltas)
        is_long = num_scores > _MOST_SCORES_AT_ONCE
        chunk = await asyncio.to_thread(self._render, deltas) if is_long else self._render(deltas)
        if chunk:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def open_stream(
    generation: Generation, *, render: Callable[[list[Delta]], bytes], last_event: Callable[[], bytes]
) -> EventStream:
    """Wait for the first deltas of a started generation, then stream and close it.

    Raises what `Generation.deltas` raises.
    """
    deltas = generation.deltas()
    first = await anext(deltas)
    generation.hand_over()
    return EventStream(generation, deltas, first=first, render=render, last_event=last_event)
