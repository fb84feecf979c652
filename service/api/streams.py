"""The crossing back from the engine: one wake-up of the event loop per step, however many requests it held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from service.engine.sequence import SequenceEvent


class Inbox:
    """Events of one HTTP request, in order; used on the event loop only.

    Bounded without a limit of its own: a sequence has at most `max_tokens` events, for which the engine
    has reserved memory. A client that reads slowly holds these, and no KV block once they are all here.
    """

    def __init__(self) -> None:
        self._events: list[SequenceEvent] = []
        self._is_filled = asyncio.Event()

    def put(self, event: SequenceEvent) -> None:
        """Add an event and wake who waits."""
        self._events.append(event)
        self._is_filled.set()

    async def take(self) -> list[SequenceEvent]:
        """All events since the last call, at least one."""
        await self._is_filled.wait()
        self._is_filled.clear()
        events, self._events = self._events, []
        return events


class EventRouter:
    """Hands the engine's events to the requests that wait for them.

    Attributes:
        busy_since: `time.monotonic` since which at least one sequence is open; None if there is none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._inboxes: dict[str, Inbox] = {}
        self.busy_since: float | None = None

    @property
    def num_open(self) -> int:
        """Sequences that somebody waits for."""
        return len(self._inboxes)

    def open(self, sequence_id: str, inbox: Inbox) -> None:
        """Send the events of a sequence to `inbox` from now on."""
        if not self._inboxes:
            self.busy_since = time.monotonic()
        self._inboxes[sequence_id] = inbox

    def close(self, sequence_id: str) -> None:
        """Drop further events of a sequence."""
        self._inboxes.pop(sequence_id, None)
        if not self._inboxes:
            self.busy_since = None

    def deliver(self, events: Sequence[SequenceEvent]) -> None:
        """Take the events of one step; called on the engine thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: Sequence[SequenceEvent]) -> None:
        for event in events:
            inbox = self._inboxes.get(event.request_id)
            if inbox is not None:
                inbox.put(event)
            if event.finish_reason is not None:
                self.close(event.request_id)
