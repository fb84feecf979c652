"""One block of load on one server: a closed loop of clients, or requests at random times whatever comes back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from service.reports.bench_client import Answer, Server
from service.reports.bench_serve_options import Load, ServeBench

MAX_OPEN: Final = 1024
"""Requests of an open loop at the same time; what comes while so many are open counts as the error `not_sent`."""

_PAUSE_AFTER_ERROR_S = 0.1
"""So that a client that is refused at once does not do nothing but ask."""


@dataclass(frozen=True, slots=True)
class Block:
    """What came of it; `seconds` from the first request to the last answer."""

    answers: list[Answer]
    seconds: float


class Prompts:
    """As many prompts as anybody asks for by number, the same for the same seed: tokens of a text in random order."""

    def __init__(self, seed: str, text_ids: Sequence[int], num_tokens: int) -> None:
        self._seed, self._text_ids, self._num_tokens = seed, text_ids, num_tokens

    def __getitem__(self, number: int) -> list[int]:
        return random.Random(f"{self._seed}/{number}").choices(self._text_ids, k=self._num_tokens)


class _Schedule:
    """Numbers of the requests of a block, until there are enough or their time is over."""

    def __init__(self, num_requests: int | None, duration_s: float) -> None:
        self._num_requests = num_requests
        self._end_s = time.perf_counter() + duration_s
        self._next = 0

    def take(self) -> int | None:
        """The next one."""
        is_over = time.perf_counter() >= self._end_s if self._num_requests is None else self._next >= self._num_requests
        if is_over:
            return None
        self._next += 1
        return self._next - 1

    async def wait_until(self, due_s: float) -> None:
        """Until then, or the end."""
        wanted_s = due_s if self._num_requests is not None else min(due_s, self._end_s)
        await asyncio.sleep(max(0.0, wanted_s - time.perf_counter()))


async def run_block(server: Server, bench: ServeBench, load: Load, number: int, *, prompts: Prompts) -> Block:
    """Put a load on a server and wait for all answers; at least one request is sent."""
    total = bench.num_requests
    share = None if total is None else max(1, len(range(number, total, bench.num_blocks)))
    schedule = _Schedule(share, bench.duration_s / bench.num_blocks)
    started = time.perf_counter()
    if load.clients is not None:
        answers = await _closed_loop(server, bench, schedule, prompts, num_clients=load.clients)
    else:
        assert load.rate_per_s is not None
        gaps = arrival_gaps(f"{bench.seed}/{load}/{number}/times", load.rate_per_s)
        answers = await _open_loop(server, bench, schedule, prompts, gaps=gaps)
    return Block(answers, time.perf_counter() - started)


async def _closed_loop(
    server: Server, bench: ServeBench, schedule: _Schedule, prompts: Prompts, *, num_clients: int
) -> list[Answer]:
    answers: list[Answer] = []

    async def work() -> None:
        while (number := schedule.take()) is not None:
            answers.append(await server.generate(prompts[number], bench.max_tokens))
            if answers[-1].error is not None:
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(work())
    return answers


async def _open_loop(
    server: Server, bench: ServeBench, schedule: _Schedule, prompts: Prompts, *, gaps: Iterator[float]
) -> list[Answer]:
    answers: list[Answer] = []
    num_open = 0

    async def send(number: int) -> None:
        nonlocal num_open
        num_open += 1
        answers.append(await server.generate(prompts[number], bench.max_tokens))
        num_open -= 1

    due_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        while (number := schedule.take()) is not None:
            if num_open < MAX_OPEN:
                group.create_task(send(number))
            else:
                answers.append(Answer(error="not_sent", seconds=0.0))
            due_s += next(gaps)
            await schedule.wait_until(due_s)
    return answers


def arrival_gaps(seed: str, rate_per_s: float) -> Iterator[float]:
    """Seconds between arrivals of a Poisson process, the same for the same seed."""
    source = random.Random(seed)
    while True:
        yield source.expovariate(rate_per_s)
