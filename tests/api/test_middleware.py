"""The request id on every answer, and one line in the log for each request."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.api.errors import install_error_handlers
from service.api.middleware import RequestMiddleware
from service.loading.progress import LoadProgress
from service.metrics import Metrics
from tests.api.support import RunningService, assert_error, eventually


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

    metrics = Metrics(CollectorRegistry(), LoadProgress(), model="m", scheme="none", device="cpu")
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
