"""Pages of other origins, the headers that browsers heed, and the page of the schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.access import read_access
from service.errors import SettingError
from service.invocation import read_invocation
from service.settings import Settings, parse_origins
from tests.api.conftest import SETTINGS
from tests.api.support import RunningService, assert_error, run_service
from tests.models import write_checkpoint

PAGE, OTHER = "https://chat.example:8443", "https://evil.example"
KEY = "alice-0123456789abc"


@pytest.fixture(scope="module")
def open_to_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that pages of one origin may use, with keys, and with the page of its schema."""
    folder = tmp_path_factory.mktemp("cors")
    (folder / "keys").write_text(KEY, encoding="utf-8")
    settings = {"cors_origin": f"http://localhost:3000, {PAGE}", "api_keys_file": str(folder / "keys"), "docs": "on"}
    model = write_checkpoint("llama", folder / "tiny")
    with run_service(SETTINGS | settings | {"model": str(model)}) as service:
        yield service


def _preflight(origin: str, method: str = "POST", headers: str = "authorization, content-type") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": headers,
    }


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_named_origin_may_ask_and_needs_no_key_for_asking(open_to_page: RunningService, method: str) -> None:
    headers = _preflight(PAGE, method, "authorization,content-type,x-stainless-os")
    response = open_to_page.client.options("/v1/chat/completions", headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert method in response.headers["access-control-allow-methods"]
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]
    assert "Origin" in response.headers["vary"]
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    ("origin", "method"),
    [(OTHER, "POST"), (f"{PAGE}.evil.example", "POST"), ("null", "POST"), (PAGE, "DELETE"), (PAGE.upper(), "POST")],
    ids=["other", "prefix", "null", "method", "case"],
)
def test_another_preflight_is_refused_with_an_envelope(open_to_page: RunningService, origin: str, method: str) -> None:
    response = open_to_page.client.options("/v1/chat/completions", headers=_preflight(origin, method))
    assert_error(response, 400, param=None, code="cors", message="--cors-origin names the origins that may")
    assert response.headers.get("access-control-allow-origin") in (None, PAGE)


def test_an_answer_may_be_read_by_the_named_origin_and_by_no_other(open_to_page: RunningService) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    allowed = open_to_page.client.get("/v1/models", headers=key | {"Origin": PAGE})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    exposed = allowed.headers["access-control-expose-headers"].lower().split(", ")
    assert {"x-request-id", "retry-after", "x-should-retry"} == set(exposed)
    other = open_to_page.client.get("/v1/models", headers=key | {"Origin": OTHER})
    assert "access-control-allow-origin" not in other.headers
    assert "Origin" in other.headers["vary"]


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/models", 401), ("/nothing", 404), ("/v1/completions", 401)], ids=["401", "404", "405"]
)
def test_a_page_can_read_errors_too(open_to_page: RunningService, path: str, status: int) -> None:
    response = open_to_page.client.get(path, headers={"Origin": PAGE})
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["x-request-id"]


def test_without_the_setting_no_page_may_use_the_service(running: RunningService) -> None:
    response = running.client.options("/v1/completions", headers=_preflight(PAGE))
    assert response.status_code == 405
    response = running.client.get("/v1/models", headers={"Origin": PAGE})
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("body", ['{"prompt": "a"}', "prompt=a"])
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_page_may_send_without_asking_is_refused(running: RunningService, content_type: str, body: str) -> None:
    headers = {"Origin": OTHER, "Content-Type": content_type}
    response = running.client.post("/v1/completions", content=body, headers=headers)
    assert_error(response, 400, param=None, code="invalid_content_type", message="it must be JSON")


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:3000",
        "https://a.example,http://b.example:8080",
        "http://[::1]:5173",
        "chrome-extension://abcdefghij",
        "*",
    ],
)
def test_origins_are_written_as_browsers_do(text: str) -> None:
    origins = read_invocation(["--cors-origin", text], {}).settings.cors_origin
    assert origins is not None
    assert parse_origins(origins) == tuple(text.split(","))


@pytest.mark.parametrize(
    "text",
    [
        "localhost",
        "https://a.example/",
        "https://a.example/x",
        "https://*.a.example",
        "*,https://a.example",
        "HTTPS://A",
    ],
)
def test_another_origin_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"--cors-origin .*must be origins such as"):
        read_invocation(["--cors-origin", text], {})


def test_all_origins_need_keys(tmp_path: Path) -> None:
    settings = Settings(cors_origin="*")
    with pytest.raises(SettingError, match=r"--cors-origin \*: without API keys .* name the origins, or set API keys"):
        read_access(settings, {})
    assert read_access(settings, {"PENNYWEIGHT_API_KEYS": KEY}).cors_origins == ("*",)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/livez", None),
        ("GET", "/metrics", None),
        ("GET", "/openapi.json", None),
        ("GET", "/nothing", None),
        ("GET", "/v1/completions", None),
        ("POST", "/v1/completions", {"prompt": "The sea", "max_tokens": 1}),
        ("POST", "/v1/completions", {"prompt": "The sea", "max_tokens": 1, "stream": True}),
        ("POST", "/v1/completions", {}),
    ],
    ids=["probe", "metrics", "schema", "404", "405", "whole", "stream", "400"],
)
def test_every_answer_tells_browsers_to_make_nothing_of_it(
    running: RunningService, method: str, path: str, body: dict[str, Any] | None
) -> None:
    headers = running.client.request(method, path, json=body).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert headers["cache-control"] in ("no-store", "no-cache")
    assert "server" not in headers


def test_the_page_of_the_schema_is_off_unless_it_is_asked_for(
    running: RunningService, open_to_page: RunningService
) -> None:
    assert running.client.get("/docs").status_code == 404
    page = open_to_page.client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "/docs" not in open_to_page.client.get("/openapi.json").json()["paths"]
