"""Clients that leave: whatever their request is doing then, its work ends within one step and is counted."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.api.support import RunningService, eventually
from tests.conftest import Gate
from tests.models import BLOCK_TOKEN_ID

BLOCK = [7, BLOCK_TOKEN_ID, 6]
THEN_BLOCK = {"prompt": [6, 7, 8], "logit_bias": {str(BLOCK_TOKEN_ID): 100}}
"""The first token that is sampled stops the step that computes the next one."""
RESET = struct.pack("ii", 1, 0)

pytestmark = pytest.mark.usefixtures("still_good")


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"max_tokens": 200, "temperature": 0, "stream": request.param}


@pytest.fixture
def aborted(running: RunningService) -> Iterator[list[float]]:
    """Sequences that the test aborts, told in this list; all they held is free afterwards."""
    before = running.metric("requests_finished_total", reason="abort")
    expected: list[float] = []
    yield expected
    assert eventually(lambda: running.metric("requests_finished_total", reason="abort") == before + sum(expected))
    assert eventually(lambda: running.metric("requests_running") == 0)
    assert running.metric("kv_blocks", state="used") == 0
    assert running.metric("requests_waiting") == 0


def _leave(client: socket.socket, running: RunningService, num_left: int) -> None:
    """Close, and wait until nobody but `num_left` sequences of others is waited for."""
    client.close()
    assert eventually(lambda: running.service.state.router.num_open == num_left)


@pytest.mark.parametrize("how", ["closed", "reset", "half-closed"])
def test_in_the_middle_of_prefill(
    running: RunningService, gate: Gate, fields: dict[str, Any], aborted: list[float], how: str
) -> None:
    computed = running.metric("engine_tokens_total")
    client = running.connect(fields | {"prompt": BLOCK})
    assert gate.reached.wait(60)
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    if how == "half-closed":  # it may still read, but nothing tells it from one that has left
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    _leave(client, running, 0)
    gate.opened.set()
    aborted.append(1)
    assert eventually(lambda: running.metric("engine_tokens_total") == computed + len(BLOCK))


def test_in_the_middle_of_decoding(
    running: RunningService, gate: Gate, fields: dict[str, Any], aborted: list[float]
) -> None:
    computed = running.metric("engine_tokens_total")
    client = running.connect(fields | THEN_BLOCK)
    assert gate.reached.wait(60)
    if fields["stream"]:
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    _leave(client, running, 0)
    gate.opened.set()
    aborted.append(1)
    # The prompt and the step that was under way: no token more.
    assert eventually(lambda: running.metric("engine_tokens_total") == computed + 3 + 1)


def test_while_it_waits(running: RunningService, gate: Gate, fields: dict[str, Any], aborted: list[float]) -> None:
    with ThreadPoolExecutor() as pool:
        blocked = pool.submit(running.complete, prompt=BLOCK, max_tokens=1)
        assert gate.reached.wait(60)
        client = running.connect(fields | {"prompt": "The sea"})
        assert eventually(lambda: running.metric("requests_waiting") == 1)
        _leave(client, running, 1)
        assert running.metric("requests_waiting") == 0  # at once, though the engine is inside a step
        gate.opened.set()
        assert blocked.result().status_code == 200
    aborted.append(1)


def test_with_several_prompts_and_choices_of_which_some_wait(
    running: RunningService, gate: Gate, fields: dict[str, Any], aborted: list[float]
) -> None:
    # 4 run together, and the step that blocks begins with the first one or more of them.
    client = running.connect(fields | {"prompt": [BLOCK, "The sea"], "n": 2})
    assert gate.reached.wait(60)
    assert eventually(lambda: running.service.state.router.num_open == 4)
    _leave(client, running, 0)
    gate.opened.set()
    aborted.append(4)
