"""Requests that wait or take too long, and streams that nobody reads."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.api.streams import MAX_HELD, Inbox
from service.engine.sequence import SequenceEvent, TokenLogprobs
from service.errors import QueueFull
from tests.api.conftest import SETTINGS
from tests.api.support import RunningService, assert_error, eventually, run_service, sse_events, write_faulty_checkpoint
from tests.conftest import Gate
from tests.models import BLOCK_TOKEN_ID

BLOCK = [7, BLOCK_TOKEN_ID, 6]
LONG: dict[str, Any] = {"prompt": "The sea", "max_tokens": 240, "temperature": 0, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faulty_checkpoint(tmp_path_factory.mktemp("faulty") / "tiny")


@pytest.fixture(scope="module")
def hasty(faulty: Path) -> Iterator[RunningService]:
    """A service that computes one sequence at a time and has little patience."""
    limits = {"max_num_seqs": 1, "queue_timeout": 0.2, "request_timeout": 1, "send_timeout": 0.2}
    with run_service(SETTINGS | {"model": str(faulty)} | limits, send_buffer=4096) as running:
        yield running


def _ended(running: RunningService, reason: str) -> float:
    return running.metric("requests_finished_total", reason=reason)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_takes_too_long_is_408_before_the_first_token_and_frees_its_blocks(
    hasty: RunningService, gate: Gate, stream: bool
) -> None:
    before = _ended(hasty, "timeout")
    with ThreadPoolExecutor() as pool:
        # The second prompt waits longer than a request may for its start; the request has begun with the first.
        running = pool.submit(hasty.complete, prompt=[BLOCK, "a"], max_tokens=1, stream=stream)
        assert gate.reached.wait(60)
        waiting = pool.submit(hasty.complete, prompt=["a", "b"], n=2, max_tokens=1, stream=stream)
        message = "waited longer than 0.2 s, the limit, and has not begun"
        assert_error(waiting.result(), 408, param=None, code="queue_timeout", message=message)
        message = "took longer than 1 s, the limit; ask for fewer tokens, or raise --request-timeout"
        assert_error(running.result(), 408, param=None, code="request_timeout", message=message)
        for answer in (running.result(), waiting.result()):
            assert answer.headers["x-should-retry"] == "false"
            assert answer.json()["error"]["type"] == "timeout_error"
        assert hasty.metric("requests_waiting") == 0
    gate.opened.set()
    assert eventually(lambda: _ended(hasty, "timeout") == before + 6)
    assert hasty.metric("kv_blocks", state="used") == 0
    assert hasty.complete(prompt="a", max_tokens=1).status_code == 200


def test_what_takes_too_long_later_is_an_event_and_done(hasty: RunningService, gate: Gate) -> None:
    before = _ended(hasty, "timeout")
    # The first token that is sampled stops the step that computes the next one.
    fields = LONG | {"logit_bias": {str(BLOCK_TOKEN_ID): 100}}
    *texts, last = sse_events(hasty.complete(**fields).text)
    assert [event["choices"][0]["text"] for event in texts] == ["\x03"]
    assert last["error"]["code"] == "request_timeout"
    gate.opened.set()
    assert eventually(lambda: _ended(hasty, "timeout") == before + 1)
    assert hasty.metric("kv_blocks", state="used") == 0


def test_a_stream_that_nobody_reads_is_dropped_and_others_are_served(
    hasty: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    # 240 events are some 60 kB, more than both buffers hold.
    with caplog.at_level(logging.INFO, "service.api.protocol"), hasty.connect(LONG, receive_buffer=4096):
        assert eventually(lambda: "a client did not read for 0.2 s; its connection was closed" in caplog.messages)
        assert hasty.complete(prompt="a", max_tokens=1).status_code == 200
    assert eventually(lambda: hasty.service.state.router.num_open == 0)
    assert eventually(lambda: hasty.metric("kv_blocks", state="used") == 0)


def test_a_client_that_reads_too_slowly_is_told_so_behind_what_there_was(faulty: Path) -> None:
    # 16 texts of 240 tokens, each with 21 log-probabilities: more than may be held, and than the buffers take.
    assert MAX_HELD + 200 * 22 < 16 * 240 * 22
    with run_service(SETTINGS | {"model": str(faulty), "max_num_seqs": 16}, send_buffer=4096) as running:
        before = _ended(running, "abort")
        with running.connect(LONG | {"n": 16, "logprobs": 20}, receive_buffer=4096) as client:
            assert eventually(lambda: _ended(running, "abort") == before + 16)
            assert running.metric("kv_blocks", state="used") == 0
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += client.recv(65536)
        lines = [line for line in data.decode("ascii").splitlines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "slow_reader"


def test_an_inbox_tells_when_it_holds_too_much_whatever_an_event_weighs() -> None:
    calls: list[None] = []
    inbox = Inbox(on_overflow=lambda: calls.append(None))
    heavy = SequenceEvent(request_id="a", token_ids=(1,), logprobs=(TokenLogprobs(0.0, ((1, 0.0),) * 20),))
    num_fit = MAX_HELD // 22
    for _ in range(num_fit):
        inbox.put(heavy)
    assert calls == []
    inbox.put(heavy)
    assert calls == [None]


async def _take_all(inbox: Inbox) -> tuple[list[str], Exception | None]:
    names = []
    try:
        while True:
            names += [event.request_id for event in await inbox.take()]
    except QueueFull as error:
        return names, error


@pytest.mark.parametrize("names", [[], ["a", "b"]], ids=["nothing", "two events"])
def test_an_inbox_gives_what_came_before_its_failure_and_nothing_after(names: list[str]) -> None:
    inbox = Inbox(on_overflow=lambda: None)
    for name in names:
        inbox.put(SequenceEvent(request_id=name))
    first = QueueFull("first")
    inbox.fail(first)
    inbox.fail(QueueFull("second"))
    inbox.put(SequenceEvent(request_id="late"))
    assert asyncio.run(_take_all(inbox)) == (names, first)
