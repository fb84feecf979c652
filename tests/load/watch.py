"""What a load test sees from inside the process: every end of a sequence, and what is left over."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from service.engine.sequence import FinishReason, SamplingParams, SequenceEvent
from tests.engine.support import CheckedEngine

OWNERS = ("service.", "_asyncio", "asyncio.", "starlette.", "uvicorn.")
"""Beginnings of the modules whose objects are counted."""
SLACK = {"asyncio.events.TimerHandle": 100, "service.api.logs.RequestRecord": 100, "allocated blocks": 1500}
"""A loop drops cancelled timers, with the contexts that they were made in, when there are a hundred of them; with
these, small allocations of any kind are 750 more, after a thousand requests as after three thousand."""
POOL = ("asyncio_", "uvloop_")
"""Threads of the pools of asyncio's event loop and of uvloop's, which start some at most when they need them."""


class WatchedEngine(CheckedEngine):
    """Checks its blocks after each step, and notes what it accepts and what ends.

    Attributes:
        num_accepted: sequences so far.
        accepted: their request ids, until they are forgotten.
        ends: terminal events by request id, likewise.
    """

    def __init__(self, *args: Any, deliver: Callable[[Sequence[SequenceEvent]], None], **options: Any) -> None:
        def note(events: Sequence[SequenceEvent]) -> None:
            for event in events:
                if event.finish_reason is not None:
                    self.ends.setdefault(event.request_id, []).append(event)
            deliver(events)

        super().__init__(*args, deliver=note, **options)
        self.num_accepted = 0
        self.accepted: list[str] = []
        self.ends: dict[str, list[SequenceEvent]] = {}

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, **options: Any) -> None:
        super().submit(request_id, prompt_ids, params, **options)
        self.accepted.append(request_id)
        self.num_accepted += 1

    def forget(self) -> None:
        """Forget what came so far."""
        self.accepted.clear()
        self.ends.clear()

    def reasons(self) -> Counter[FinishReason | None]:
        """How often a sequence ended in which way."""
        return Counter(event.finish_reason for events in self.ends.values() for event in events)

    def aborted(self) -> Counter[str]:
        """Where the sequences were that ended by an abort."""
        found: Counter[str] = Counter()
        for (event,) in self.ends.values():
            if event.finish_reason is FinishReason.ABORT:
                assert event.timings is not None
                if event.timings.queue_s is None:
                    found["queued"] += 1
                else:
                    found["reading its prompt" if event.timings.first_token_s is None else "decoding"] += 1
        return found


def left_over(before: Counter[str]) -> dict[str, int]:
    """What there is more of than in an earlier census, but for what asyncio keeps for a while."""
    return {name: count for name, count in (census() - before).items() if count > SLACK.get(name, 0)}


def census() -> Counter[str]:
    """Live objects by type, all small allocations, threads and open files."""
    for _ in range(2):  # an object with a finaliser is gone after the second
        gc.collect()
    num_blocks = sys.getallocatedblocks()
    types = (type(thing) for thing in gc.get_objects())
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in types)  # a module may be no string
    found = Counter(name for name in names if name.startswith(OWNERS))
    found["allocated blocks"] = num_blocks
    threads = [thread.name for thread in threading.enumerate()]
    found["threads"] = sum(not name.startswith(POOL) for name in threads)
    found["open files"] = len(os.listdir("/proc/self/fd"))
    return found
