"""The request id on every answer, and one line in the log for each request."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import uuid

import httpx
import pytest
from fastapi import FastAPI, Request

from service.api.errors import install_error_handlers
from service.api.logs import JsonFormatter
from service.api.middleware import RequestMiddleware
from service.loading.progress import LoadProgress
from service.metrics import Metrics
from tests.api.support import RunningService, assert_error, eventually
from tests.models import RAISE_TOKEN_ID


@pytest.mark.parametrize("sent", ["abc", "A.b_c-9", "x" * 64])
@pytest.mark.parametrize("route", ["/livez", "/nothing", "/v1/completions"], ids=["good", "404", "405"])
def test_a_sane_request_id_is_taken_over(running: RunningService, sent: str, route: str) -> None:
    assert running.client.get(route, headers={"X-Request-ID": sent}).headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "a\tb", "é", "a;b"])
def test_another_request_id_is_replaced(running: RunningService, sent: str) -> None:
    got = running.client.get("/livez", headers=[(b"X-Request-ID", sent.encode())]).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", got)


def _application_with_a_defect() -> RequestMiddleware:
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/defect")
    def defect() -> None:
        raise ValueError("/secret/path")

    metrics = Metrics(LoadProgress(), model="m", scheme="none", device="cpu")
    return RequestMiddleware(app, metrics=metrics, max_body_bytes=1000)


def test_a_defect_is_500_with_envelope_and_id_and_without_its_text() -> None:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(_application_with_a_defect(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/defect")

    response = asyncio.run(get())
    assert_error(response, 500, param=None, code="internal_error", message="the service failed on this request")
    assert response.headers["x-should-retry"] == "false"
    assert "secret" not in response.text


def test_the_bodies_of_all_requests_together_are_bounded() -> None:
    app = FastAPI()
    install_error_handlers(app)
    metrics = Metrics(LoadProgress(), model="m", scheme="none", device="cpu")
    bounded = RequestMiddleware(app, metrics=metrics, max_body_bytes=1000)

    async def post() -> tuple[list[int], int]:
        answering = asyncio.Event()

        @app.post("/hold")
        async def hold(request: Request) -> None:
            await request.body()
            await answering.wait()

        transport = httpx.ASGITransport(bounded)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            held = [asyncio.create_task(client.post("/hold", content=b"a" * 1000)) for _ in range(64)]
            while (refused := await asyncio.wait_for(client.post("/hold", content=b"a" * 500), 60)).status_code != 503:
                pass
            assert_error(refused, 503, param=None, code="overloaded", message="hold 64000 bytes, the limit")
            assert refused.headers["retry-after"] == "1"
            answering.set()
            answers = [answer.status_code for answer in await asyncio.gather(*held)]
            return answers, (await client.post("/hold", content=b"a" * 1000)).status_code

    assert asyncio.run(post()) == ([200] * 64, 200)


def test_a_request_leaves_one_line_in_the_log_and_a_probe_none(
    running: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"/{uuid.uuid4().hex}"
    with caplog.at_level(logging.INFO, "service.api.middleware"):
        running.client.get("/livez")
        running.client.request("BREW", name)
        assert eventually(lambda: len(caplog.messages) >= 1)
    assert len(caplog.messages) == 1
    assert re.fullmatch(r"other unknown 404 \d+\.\d{3} s", caplog.messages[0])


SECRET = "a text that nobody else should read"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_line_of_a_request_has_its_figures_and_not_its_text(
    running: RunningService, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    num_prompt_tokens = running.client.post("/tokenize", json={"prompt": SECRET}).json()["count"]
    body = {"prompt": SECRET, "max_tokens": 3, "n": 2, "ignore_eos": True, "stream": stream, "user": SECRET}
    with caplog.at_level(logging.DEBUG, "service"):
        running.client.post("/v1/completions", json=body, headers={"X-Request-ID": "figures"})
        assert eventually(lambda: any("/v1/completions" in message for message in caplog.messages))
    (record,) = [record for record in caplog.records if "/v1/completions" in record.getMessage()]
    figures = f"prompt_tokens {num_prompt_tokens}, generated_tokens 6, finish_reason length"
    assert re.fullmatch(rf"POST /v1/completions 200 \d+\.\d{{3}} s, {figures}", record.getMessage())
    entry = json.loads(JsonFormatter().format(record))
    assert entry.items() >= {
        *(("method", "POST"), ("route", "/v1/completions"), ("status", 200), ("finish_reason", "length")),
        *(("prompt_tokens", num_prompt_tokens), ("generated_tokens", 6)),
    }
    assert entry["seconds"] > 0
    assert not any("nobody else" in str(entry.__dict__) for entry in caplog.records)


def test_a_request_that_ends_badly_has_a_line_too(running: RunningService, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "service.api.middleware"):
        running.complete(prompt=[8, RAISE_TOKEN_ID], max_tokens=1)
        assert eventually(lambda: any(message.startswith("POST") for message in caplog.messages))
    expected = r"POST /v1/completions 500 \d+\.\d{3} s, prompt_tokens 2, generated_tokens 0, finish_reason error"
    assert re.fullmatch(expected, caplog.messages[-1])


def test_a_client_that_leaves_in_the_middle_of_its_body_has_not_sent_a_bad_one(
    running: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    bad = running.metric("requests_total", route="/v1/completions", status="400")
    gone = running.metric("requests_total", route="/v1/completions", status="499")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99"
    with caplog.at_level(logging.INFO, "service.api.middleware"):
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            client.sendall(head + b"\r\n\r\n{")
        assert eventually(lambda: any(message.startswith("POST /v1/completions 499") for message in caplog.messages))
    assert running.metric("requests_total", route="/v1/completions", status="499") == gone + 1
    assert running.metric("requests_total", route="/v1/completions", status="400") == bad


def test_prompts_are_logged_where_an_operator_wants_it(
    chat: RunningService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat.service.state, "log_prompts", True)
    with caplog.at_level(logging.INFO, "service.api.generation"):
        chat.complete(prompt=["the\nsea", [5, 6]], max_tokens=1)
        chat.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "ahoy"}]})
    first, second, third = [r.getMessage() for r in caplog.records if r.name == "service.api.generation"]
    assert first == "prompt: the\nsea"
    assert second.startswith("prompt: ")
    assert "<|turn|>user\nahoy<|end|>" in third
