"""The page's files: how they are served, and that nothing in them needs another host or slips past the policy."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest

from service.api.application import create_application
from service.api.state import ServiceState
from service.api.streams import EventRouter
from service.errors import SettingError
from service.invocation import read_invocation
from service.loading.progress import LoadProgress, Phase
from service.metrics import Metrics
from tests.api.support import RunningService, assert_error
from tests.floors import MAX_FILE_LINES, ROOT

WEB = ROOT / "service" / "web"
FILES = sorted(path.name for path in WEB.iterdir())
TWIN = "http://10.0.0.7:8001"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NAMESPACE = "http://www.w3.org/2000/svg"
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setHTML|srcdoc|DOMParser"
    r"|<style|style=|javascript:|\son[a-z]+=|@import"
)


def _get(path: str, *, twin: str | None = None, phase: Phase = Phase.LOAD, method: str = "GET") -> httpx.Response:
    """Ask an application whose model is not loaded."""

    async def ask() -> httpx.Response:
        progress = LoadProgress()
        progress.enter(phase)
        metrics = Metrics(progress, model="m", scheme="none", device="cpu")
        router = EventRouter(asyncio.get_running_loop())
        state = ServiceState(model_name="m", scheme="none", metrics=metrics, router=router, progress=progress)
        transport = httpx.ASGITransport(create_application(state, max_body_bytes=1000, twin=twin))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path)

    return asyncio.run(ask())


def _policy(response: httpx.Response) -> dict[str, list[str]]:
    rules = (rule.split() for rule in response.headers["content-security-policy"].split("; "))
    return {name: sources for name, *sources in rules}


@pytest.mark.parametrize("phase", Phase)
def test_the_page_answers_in_every_phase(phase: Phase) -> None:
    page = _get("/", phase=phase)
    assert page.status_code == 200
    assert page.content == (WEB / "index.html").read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_as_what_it_is(running: RunningService, name: str) -> None:
    response = running.client.get(f"/web/{name}")
    assert response.content == (WEB / name).read_bytes()
    assert response.headers["content-type"].partition(";")[0] == MEDIA_TYPES[Path(name).suffix]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/", "/web/main.js", "/web/page.json"])
def test_head_has_the_headers_and_no_content(running: RunningService, path: str) -> None:
    head, whole = running.client.head(path), running.client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))


def test_a_browser_that_has_a_file_gets_it_again_only_if_it_changed(running: RunningService) -> None:
    etag = running.client.get("/").headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}'):
        response = running.client.get("/", headers={"If-None-Match": known})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)
    assert running.client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200
    assert running.client.get("/web/main.js").headers["etag"] != etag


@pytest.mark.parametrize("name", ["nothing.js", "..%2fsettings.py", "%2e%2e/settings.py", "a/b", ""])
def test_there_is_no_other_file(running: RunningService, name: str) -> None:
    assert_error(running.client.get(f"/web/{name}"), 404, param=None, code="unknown_route", message="no such")


def test_a_path_is_no_label(running: RunningService) -> None:
    before = running.metric("requests_total", route="/web/{name}", status="404")
    running.client.get("/web/whatever-somebody-sends")
    assert running.metric("requests_total", route="/web/{name}", status="404") == before + 1
    assert "whatever-somebody" not in running.client.get("/metrics").text


def test_the_policy_allows_files_of_the_service_and_nothing_else(running: RunningService) -> None:
    page = running.client.get("/")
    policy = _policy(page)
    assert policy["default-src"] == policy["connect-src"] == ["'self'"]
    assert policy["require-trusted-types-for"] == ["'script'"]
    assert all(policy[name] == ["'none'"] for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types"))
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["referrer-policy"] == "no-referrer"


def test_with_a_twin_the_page_may_ask_that_one_too() -> None:
    assert _policy(_get("/", twin=TWIN))["connect-src"] == ["'self'", TWIN]
    assert _get("/web/page.json", twin=TWIN).json() == {"twin": TWIN}
    assert _get("/web/page.json").json() == {"twin": None}


@pytest.mark.parametrize("text", ["http://localhost:8001", "https://gpu-2.example", "http://10.0.0.7:65535"])
def test_a_twin_is_an_origin(text: str) -> None:
    assert read_invocation(["--twin", text], {}).settings.twin == text


@pytest.mark.parametrize(
    "text",
    [
        "localhost:8001",
        "ftp://localhost",
        "http://localhost:8001/",
        "http://localhost/v1",
        "http://LOCALHOST",
        "http://user@localhost",
        "http://localhost:0",
        "http://localhost:65536",
        "http://[::1]:8001",
        "http://a; script-src *",
        "http://a http://b",
        "http://*",
        "http://a\n",
    ],
)
def test_another_twin_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"--twin .*must be an origin such as http://127.0.0.1:8001"):
        read_invocation(["--twin", text], {})


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host_or_makes_markup_of_text(name: str) -> None:
    text = (WEB / name).read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:)?//[a-z0-9][^\s\"')>]*", text.replace(NAMESPACE, "")) == []
    assert FORBIDDEN.findall(text) == []
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert [
        line for line in text.splitlines() if len(line) > 120 and not name.endswith((".html", ".css", ".svg"))
    ] == []


def test_every_file_is_used_by_another() -> None:
    texts = {name: (WEB / name).read_text(encoding="utf-8") for name in FILES}
    for name in set(FILES) - {"index.html"}:
        assert [other for other, text in texts.items() if other != name and re.search(rf"(web|\.)/{name}", text)]


def test_every_part_that_a_file_names_is_there() -> None:
    for name in FILES:
        text = (WEB / name).read_text(encoding="utf-8")
        assert set(re.findall(r"(?:\"web/|from \"\./)([a-z]+\.(?:js|css|svg))\"", text)) <= set(FILES)
