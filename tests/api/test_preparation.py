"""Work that comes before the engine: rendering, tokenizing and trying grammars end in time, and with the client."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.conftest import SETTINGS
from tests.api.support import RunningService, assert_error, eventually, run_service, write_chat_checkpoint

LOOP = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
TEMPLATE = "{% for m in messages %}{% if m.content == 'loop' %}" + LOOP + "{% endif %}{{ m.content }}{% endfor %}"
"""A rendering has two seconds."""


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 1}


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = write_chat_checkpoint(tmp_path_factory.mktemp("loops") / "tiny", template=TEMPLATE)
    with run_service(SETTINGS | {"model": str(folder), "queue_timeout": 0.5, "max_queue": 4}) as running:
        eventually(lambda: running.client.post("/v1/chat/completions", json=chat("a")).status_code == 200)
        yield running


def test_a_rendering_takes_no_longer_than_a_request_may_wait(hasty: RunningService) -> None:
    answer = hasty.client.post("/v1/chat/completions", json=chat("loop"))
    message = "took longer than 0.5 s, the limit, before its turn could come"
    assert_error(answer, 408, param=None, code="queue_timeout", message=message)
    assert answer.headers["x-should-retry"] == "false"
    assert eventually(lambda: hasty.client.post("/v1/chat/completions", json=chat("a")).status_code == 200)


def test_who_leaves_during_the_rendering_is_counted_as_gone(hasty: RunningService) -> None:
    labels = {"route": "/v1/chat/completions", "status": "499"}
    before = hasty.metric("requests_total", **labels)
    body = json.dumps(chat("loop")).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", hasty.port)) as client:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert eventually(lambda: hasty.metric("requests_total", route="/metrics", status="200") > 0)
    assert eventually(lambda: hasty.metric("requests_total", **labels) == before + 1)


def test_more_texts_than_the_queue_ever_holds_are_400_and_as_many_as_it_holds_are_not(hasty: RunningService) -> None:
    fields = {"prompt": "a", "max_tokens": 1}
    assert_error(
        hasty.complete(**fields, n=5),
        400,
        param=None,
        code="queue_too_short",
        message="5 texts at once, the queue holds 4",
    )
    assert hasty.complete(**fields, n=4).status_code == 200
