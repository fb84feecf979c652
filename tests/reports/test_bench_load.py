"""Closed loops never have more requests open than clients, open ones send at their times, and both end."""

from __future__ import annotations

import asyncio
import threading
from itertools import islice
from math import exp
from statistics import fmean
from typing import Any

import pytest

from service.reports.bench_client import connected
from service.reports.bench_load import Block, Prompts, arrival_gaps, run_block
from service.reports.bench_serve_options import Load, ServeBench
from tests.reports.scripted import Handler, ScriptedServer, refusal, scripted

TEXT_IDS = range(1, 101)
COMPUTES = threading.Event()
"""Never set; a server waits for it while it seems to compute."""


def run(server: ScriptedServer, load: Load, number: int = 0, **fields: Any) -> Block:
    bench = ServeBench(urls=(server.url,), num_prompt_tokens=8, max_tokens=3, **fields)

    async def measured() -> Block:
        async with connected(server.url, api_key=None, timeout_s=20) as client:
            return await run_block(client, bench, load, number, prompts=Prompts("0", TEXT_IDS, 8))

    return asyncio.run(measured())


def most_open(spans: list[tuple[float, float]]) -> int:
    """Largest number of spans that overlap."""
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    return max(sum(change for _, change in changes[: index + 1]) for index in range(len(changes)))


def slow(handler: Handler, body: dict[str, Any]) -> None:
    COMPUTES.wait(0.01)
    handler.stream(*[{"token_ids": [5]}] * body["max_tokens"], "[DONE]")


@pytest.mark.parametrize("num_clients", [1, 4])
def test_as_many_requests_are_open_as_there_are_clients(num_clients: int) -> None:
    with scripted({"/generate": slow}) as server:
        block = run(server, Load(num_clients, None), num_requests=24, num_blocks=1)
        assert most_open(server.spans) <= num_clients
        assert len(server.spans) == len(block.answers) == 24
    assert num_clients == 1 or most_open(server.spans) > 1
    assert [answer.error for answer in block.answers] == [None] * 24
    assert block.seconds >= max(answer.seconds for answer in block.answers)


def test_blocks_share_the_requests() -> None:
    with scripted() as server:
        sizes = [len(run(server, Load(2, None), number, num_requests=7, num_blocks=3).answers) for number in range(3)]
    assert sizes == [3, 2, 2]


def test_a_block_is_over_when_its_time_is() -> None:
    with scripted({"/generate": slow}) as server:
        block = run(server, Load(2, None), duration_s=0.4, num_blocks=2)
    assert block.seconds >= 0.2
    assert block.answers
    assert block.seconds - 0.2 <= max(answer.seconds for answer in block.answers) + 0.2


def test_a_client_that_is_refused_does_not_ask_without_a_pause() -> None:
    with scripted({"/generate": refusal(429, "full")}) as server:
        block = run(server, Load(1, None), duration_s=0.35, num_blocks=1)
    assert {answer.error for answer in block.answers} == {"http_429"}
    assert 1 <= len(block.answers) <= 4


def test_requests_of_an_open_loop_come_though_none_is_answered() -> None:
    def never(handler: Handler, body: dict[str, Any]) -> None:
        while len(handler.server.bodies) < 10:
            COMPUTES.wait(0.001)
        handler.stream(*[{"token_ids": [5]}] * body["max_tokens"], "[DONE]")

    with scripted({"/generate": never}) as server:
        block = run(server, Load(None, 200.0), num_requests=10, num_blocks=1)
    assert [answer.error for answer in block.answers] == [None] * 10
    assert most_open(server.spans) == 10


def test_arrivals_are_as_many_as_the_rate_says_and_the_same_for_the_same_seed() -> None:
    gaps, same, others = (list(islice(arrival_gaps(seed, 20.0), 10_000)) for seed in ("a", "a", "b"))
    assert gaps == same != others
    # The mean of exponential gaps has a standard deviation of 1 / (rate * sqrt(number)); five of them.
    assert fmean(gaps) == pytest.approx(1 / 20, abs=5 / (20 * 100))
    assert fmean(gap > 1 / 20 for gap in gaps) == pytest.approx(exp(-1), abs=5 * 0.5 / 100)


def test_an_open_loop_with_a_long_gap_ends_with_its_time() -> None:
    with scripted() as server:
        block = run(server, Load(None, 0.01), duration_s=0.2, num_blocks=1)
    assert len(block.answers) == 1
    assert block.seconds < 10


def test_prompts_are_tokens_of_the_text_and_differ_from_their_first_tokens_on() -> None:
    prompts = [Prompts("0", TEXT_IDS, 16)[number] for number in range(200)]
    assert all(len(prompt) == 16 and set(prompt) <= set(TEXT_IDS) for prompt in prompts)
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 200
    assert Prompts("0", TEXT_IDS, 16)[3] == prompts[3] != Prompts("1", TEXT_IDS, 16)[3]
