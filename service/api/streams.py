"""The crossing back from the engine: one wake-up of the event loop per step at most, however many requests it held."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from service.engine.sequence import SequenceEvent

MAX_HELD = 65536
"""Events, and log-probabilities in them, that wait for one client at most; some 10 MB of memory."""
MOST_PATIENT = 128
"""Events that wait until somebody reads them, where nobody wants them one by one."""


class Inbox:
    """Events of one HTTP request, in order; used on the event loop only.

    Args:
        on_overflow: called when more is held than `MAX_HELD`: the client reads more slowly than the engine writes.

    Attributes:
        is_patient: whether events may wait for `MOST_PATIENT` of them, or for one that ends its sequence.
    """

    def __init__(self, on_overflow: Callable[[], None]) -> None:
        self.is_patient = False
        self._on_overflow = on_overflow
        self._events: list[SequenceEvent] = []
        self._num_held = 0
        self._failure: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: SequenceEvent) -> None:
        """Add an event and wake who waits for it."""
        if self._failure is not None:
            return
        self._events.append(event)
        self._num_held += 1
        if event.logprobs:
            self._num_held += sum(1 + len(logprobs.top) for logprobs in event.logprobs)
        if not self.is_patient or event.finish_reason is not None or len(self._events) >= MOST_PATIENT:
            self._wake()
        if self._num_held > MAX_HELD:
            self._on_overflow()

    def fail(self, error: Exception) -> None:
        """Take nothing more: `take` gives what came before, then raises `error`. Only the first one counts."""
        if self._failure is None:
            self._failure = error
            self._wake()

    async def take(self) -> list[SequenceEvent]:
        """All events since the last call, at least one.

        Raises:
            Exception: that of `fail`.
        """
        if not self._events and self._failure is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self._failure is not None and not self._events:
            raise self._failure
        events, self._events = self._events, []
        self._num_held = 0
        return events

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class EventRouter:
    """Hands the engine's events to the requests that wait for them.

    Attributes:
        busy_since: `time.monotonic` since which at least one sequence is open; None if there is none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._inboxes: dict[str, Inbox] = {}
        self._pending: deque[SequenceEvent] = deque()  # the engine's thread appends, the event loop takes
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
        self._pending.extend(events)
        is_wanted = len(self._pending) >= MOST_PATIENT or any(map(self._is_wanted, events))
        if is_wanted and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch)

    def _dispatch(self) -> None:
        while self._pending:
            event = self._pending.popleft()
            inbox = self._inboxes.get(event.request_id)
            if inbox is not None:
                inbox.put(event)
            if event.finish_reason is not None:
                self.close(event.request_id)

    def _is_wanted(self, event: SequenceEvent) -> bool:
        """Whether an event is to be read at once; one that came before its request waits for it is."""
        inbox = self._inboxes.get(event.request_id)
        return inbox is None or not inbox.is_patient or event.finish_reason is not None
