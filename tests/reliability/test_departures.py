"""Clients that leave: many of them, at any moment, politely or not."""

from __future__ import annotations

import json
import random
import socket
import struct
from collections import deque
from contextlib import suppress
from typing import Any

import pytest

from tests.api.support import RunningService, eventually
from tests.reliability.conftest import KEY
from tests.reliability.fields import MESSAGES
from tests.reliability.wire import request

pytestmark = pytest.mark.reliability

NUM_DEPARTURES, NUM_NIGHTLY_DEPARTURES = 150, 5000
MOST_OPEN = 12
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, with no time: `close` resets the connection."""


def _asked(chance: random.Random) -> bytes:
    fields: dict[str, Any] = {"max_tokens": chance.randint(1, 20), "stream": chance.random() < 0.5}
    fields["n"] = chance.choice((1, 1, 2, 4))
    route, prompt = chance.choice(
        (
            ("/v1/completions", {"prompt": ["The sea", "A wood"]}),
            ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5}),
            ("/generate", {"token_ids": [7, 8, 9]}),
        )
    )
    data = request("POST", route, json.dumps(fields | prompt), key=KEY)
    return data[: chance.choice((len(data), len(data), len(data) - 5))]


def _leave(client: socket.socket, chance: random.Random) -> None:
    """After some of the answer, or none of it."""
    num_bytes = chance.choice((0, 0, 1, 300, 2000))
    client.settimeout(0.02)
    if num_bytes:
        with suppress(TimeoutError, ConnectionError):
            client.recv(num_bytes)
    if chance.random() < 0.5:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    client.close()


@pytest.mark.parametrize(
    "number",
    [NUM_DEPARTURES, pytest.param(NUM_NIGHTLY_DEPARTURES, marks=pytest.mark.nightly)],
    ids=["some", "a storm"],
)
def test_clients_that_leave_at_any_moment_leave_nothing_behind(keyed: RunningService, number: int) -> None:
    canary = keyed.canary()
    chance = random.Random(10)
    clients: deque[socket.socket] = deque()
    for _ in range(number):
        client = socket.create_connection(("127.0.0.1", keyed.port))
        client.sendall(_asked(chance))
        clients.append(client)
        if len(clients) == MOST_OPEN:
            _leave(clients.popleft(), chance)
    for client in clients:
        _leave(client, chance)
    assert eventually(lambda: keyed.metric("requests_running") + keyed.metric("requests_waiting") == 0)
    assert eventually(lambda: keyed.metric("kv_blocks", state="used") == 0)
    assert eventually(lambda: keyed.service.state.router.num_open == 0)
    assert keyed.metric("requests_finished_total", reason="abort") > 0
    assert keyed.canary() == canary
