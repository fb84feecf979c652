"""A thousand requests of 64 clients over HTTP, many of whom go away: what stays is right, and nothing is left over."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests.api.support import RunningService, eventually, run_service, write_faulty_checkpoint
from tests.engine.support import BYTES_PER_BLOCK
from tests.load.clients import TIMEOUT_S, Reply, send, send_all
from tests.load.oracle import count_steady
from tests.load.traffic import MAX_CHOICES, Request, Text, Traffic
from tests.load.watch import WatchedEngine, census, left_over
from tests.models import build_model, build_tokenizer

SETTINGS = {
    "quantize": "none",
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "max_num_seqs": 24,
    "max_num_batched_tokens": 64,
    "kv_memory": 64 * BYTES_PER_BLOCK,
}
"""Too few blocks for all that may run, of 1 to 10 blocks each."""
NUM_WARM = 150
LOGPROB_BOUND = 1e-4
"""In nats; another order of the sums moves a logit by some 1e-5."""
PLACES = ("queued", "decoding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much of what; see `Traffic`."""

    seed: int
    num_requests: int
    num_cases: int
    has_faults: bool


@contextmanager
def watched_service(folder: Path) -> Iterator[tuple[RunningService, WatchedEngine]]:
    """A service of the tiny faulty Llama and its engine, which notes what ends."""
    write_faulty_checkpoint(folder)
    with run_service(SETTINGS | {"model": str(folder)}) as running:
        served = running.service.state.served
        assert served is not None
        assert isinstance(served.engine, WatchedEngine)
        yield running, served.engine


async def find_out(url: str, traffic: Traffic) -> None:
    """Send each sampled case alone, one choice after another, and keep what does not depend on rounding."""
    texts = []
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
        for case in traffic.cases:
            while len(case.full) < MAX_CHOICES:
                request = traffic.alone(case, len(case.full))
                reply = await send(client, request)
                assert reply.is_complete
                case.full.append(reply.texts[0].token_ids or [])
                case.errors.append(reply.error)
                texts.append((request.case.prompt, request.case.sampling, case.full[-1]))
    counts = iter(count_steady(texts))
    for case in traffic.cases:
        for choice in range(0 if case.is_greedy else MAX_CHOICES):
            count = next(counts)
            if count < len(case.full[choice]):
                case.full[choice], case.errors[choice] = case.full[choice][:count], None


def check_reply(request: Request, reply: Reply, tokenizer: Tokenizer) -> None:
    """What was read is what the request gives alone, or the beginning of it where its client went away."""
    if errors := request.errors():
        assert not reply.is_complete or reply.error in errors
        assert reply.status in ((None, 200, 500) if request.is_streamed or reply.status is None else (500,))
    else:
        assert reply.error is None
        assert reply.status in (None, 200)
        expected = request.expected(tokenizer)
        assert not reply.is_complete or len(reply.texts) == len(expected)
        for index, text in reply.texts.items():
            check_text(text, expected[index], is_complete=reply.is_complete)


def check_text(text: Text, expected: Text, *, is_complete: bool) -> None:
    """Equal, or the beginning."""
    assert expected.token_ids is not None
    assert text.end == expected.end or (text.end is None and not is_complete)
    assert text.text == expected.text if text.end else expected.text.startswith(text.text)
    if text.token_ids is not None:
        assert text.token_ids == (expected.token_ids if text.end else expected.token_ids[: len(text.token_ids)])
    if text.logprobs is not None and expected.logprobs is not None:
        assert text.logprobs == pytest.approx(expected.logprobs[: len(text.logprobs)], abs=LOGPROB_BOUND)


def check_rest(running: RunningService, engine: WatchedEngine) -> None:
    """Each accepted sequence has ended once, and nothing is held."""
    assert eventually(lambda: running.metric("requests_finished_total") == engine.num_accepted)
    assert sorted(engine.ends) == sorted(engine.accepted)
    assert all(len(events) == 1 for events in engine.ends.values())
    assert running.metric("requests_running") == running.metric("requests_waiting") == 0
    state = engine.state()
    assert state.num_free_kv_blocks + state.num_cached_kv_blocks == state.num_kv_blocks
    assert not state.has_failed


@pytest.fixture(autouse=True)
def _unlogged(caplog: pytest.LogCaptureFixture) -> None:
    """Records of failures would hold what failed."""
    caplog.set_level(logging.CRITICAL + 1, logger="service")


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.assembly.Engine", WatchedEngine)


def put_under_load(folder: Path, load: Load) -> None:
    """Send a load's requests, check every answer and what is left."""
    print(f"LOAD_SEED={load.seed} lets these clients send the same again")
    tokenizer: Tokenizer = build_tokenizer().backend_tokenizer
    traffic = Traffic(load.seed, build_model("faulty"), tokenizer, num_cases=load.num_cases, has_faults=load.has_faults)
    with watched_service(folder / "tiny") as (running, engine):
        asyncio.run(find_out(running.url, traffic))
        asyncio.run(send_all(running.url, traffic.requests(NUM_WARM)))
        check_rest(running, engine)
        engine.forget()
        before = census()
        requests = traffic.requests(load.num_requests)
        replies = asyncio.run(send_all(running.url, requests))
        check_rest(running, engine)
        for request, reply in zip(requests, replies, strict=True):
            check_reply(request, reply, tokenizer)
        check_variety(running, engine, replies)
        del requests, replies
        engine.forget()
        assert eventually(lambda: not left_over(before)), left_over(before)


def check_variety(running: RunningService, engine: WatchedEngine, replies: list[Reply]) -> None:
    """What this is about has happened, and often."""
    aborted = engine.aborted()
    print(f"{Counter(str(reply.status) for reply in replies)}, {engine.reasons()}, aborted {aborted}")
    print(f"{running.metric('preemptions_total')} preemptions")
    assert min(aborted[place] for place in PLACES) > 0
    assert running.metric("preemptions_total") > 0
    assert running.metric("prefix_cache_hit_tokens_total") > 0
    complete = sum(reply.is_complete and reply.status == 200 for reply in replies)
    assert complete > len(replies) / 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"text": "at"},
        {"token_ids": [1, 3]},
        {"token_ids": [1]},
        {"logprobs": [-0.5, -1 - 2 * LOGPROB_BOUND]},
        {"end": "stop"},
        {"end": None},
    ],
    ids=lambda wrong: "-".join(map(str, *wrong.items())),
)
def test_a_wrong_answer_would_be_noticed(wrong: dict[str, Any]) -> None:
    right = Text("as", [1, 2], [-0.5, -1.0], "length")
    check_text(right, right, is_complete=True)
    check_text(Text("a", [1], [-0.5], None), right, is_complete=False)
    with pytest.raises(AssertionError):
        check_text(replace(right, **wrong), right, is_complete=True)


def test_what_is_left_would_be_counted() -> None:
    before = census()
    held = asyncio.Event()
    assert left_over(before) == {"asyncio.locks.Event": 1}
    del held
    assert not left_over(before)


def test_a_thousand_requests_get_what_they_get_alone_and_leave_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("LOAD_SEED", "0"))
    put_under_load(tmp_path, Load(seed=seed, num_requests=1000, num_cases=32, has_faults=False))


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(3))
def test_thousands_of_requests_beside_faults_get_what_they_get_alone(tmp_path: Path, number: int) -> None:
    seed = number + int(os.environ.get("LOAD_SEED", random.SystemRandom().randrange(2**32)))
    put_under_load(tmp_path, Load(seed=seed, num_requests=3000, num_cases=100, has_faults=True))
