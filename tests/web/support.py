"""A real Chromium on the page, and services for it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from service.api.application import create_application
from service.api.listener import open_port
from service.api.state import ServiceState
from service.api.streams import EventRouter
from service.loading.progress import LoadProgress
from service.metrics import Metrics
from tests.api.support import RunningService, eventually
from tests.deploy.support import REQUIRE_TOOLS

WAIT_MS = 60_000
SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1, "kv_memory": 2**24}
FAILED_REQUEST = "Failed to load resource"
"""What Chromium itself says of every answer from 400 on, and of servers that are not there."""
PROMPT = '"I am afraid," said the old man,'
GREEDY = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0}


def chromium() -> str:
    """The program; the test is skipped where it is not installed, unless the environment says that it must be."""
    program = shutil.which("chromium")
    if program is None:
        message = "chromium is not installed (Debian's package chromium)"
        if os.environ.get(REQUIRE_TOOLS) == "1":
            pytest.fail(f"{message}, and {REQUIRE_TOOLS}=1")
        pytest.skip(message)
    return program


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        yield browser
        browser.close()


class Watched:
    """A page in a profile of its own, whose console and requests are watched.

    Attributes:
        errors: what the console calls an error or a warning, and exceptions of scripts.
        origins: of all requests.
    """

    def __init__(self, browser: Browser, **options: Any) -> None:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, "color_scheme": "light"} | options)
        context.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        self.page: Page = context.new_page()
        self.errors: list[str] = []
        self.origins: set[str] = set()
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.origins.add("/".join(request.url.split("/")[:3])))

    def close(self) -> None:
        """End the profile."""
        self.page.context.close()

    def visit(self, url: str) -> Page:
        """Open the page of a service and wait until it knows the model."""
        self.page.goto(f"{url}/")
        self.page.wait_for_selector("#phase[data-phase=ready]")
        self.page.wait_for_selector("#generate:enabled")
        return self.page

    def forgive_failed_requests(self) -> None:
        """Drop the browser's own lines about answers that the test brought about."""
        self.errors = [error for error in self.errors if FAILED_REQUEST not in error]

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)


def fill_form(page: Page, **fields: object) -> None:
    """Write into the form, by the names of its labels."""
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " ").capitalize(), exact=True).fill(str(value))


def generate(page: Page) -> None:
    """Press the button and wait for the end."""
    page.get_by_role("button", name="Generate").click()
    wait_for_end(page)


def wait_for_end(page: Page) -> None:
    """Wait until all sides have ended. The page's policy lets no condition be evaluated from text."""
    expect(page.locator("#difference")).to_contain_text("Ended.")


def outputs(page: Page) -> list[str]:
    """Texts of the sides."""
    return [text or "" for text in page.locator(".output").all_text_contents()]


def figures(page: Page) -> list[str]:
    """What stands below the texts."""
    return page.locator(".figures").all_inner_texts()


def notices(page: Page) -> list[str]:
    """What the page complains about."""
    return page.locator(".notice").all_inner_texts()


def generated(running: RunningService, **fields: Any) -> dict[str, Any]:
    """`POST /generate` without a browser."""
    response = running.client.post("/generate", json=GREEDY | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve_phases(settings: Mapping[str, Any] | None = None) -> Iterator[tuple[str, LoadProgress]]:
    """The application without a model, in the phases that the test enters; its URL and its progress."""
    listener = open_port("127.0.0.1", 0)
    progress = LoadProgress()
    made: Future[uvicorn.Server] = Future()

    async def serve() -> None:
        metrics = Metrics(progress, model="m", scheme="w8a16", device="cpu")
        router = EventRouter(asyncio.get_running_loop())
        state = ServiceState(model_name="m", scheme="w8a16", metrics=metrics, router=router, progress=progress)
        application = create_application(state, max_body_bytes=1000, **(settings or {}))
        server = uvicorn.Server(uvicorn.Config(application, lifespan="off", log_config=None))
        made.set_result(server)
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    server = made.result()
    assert eventually(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", progress
    finally:
        server.should_exit = True
        thread.join()


def written_text(folder: Path, text: str) -> str:
    """A file that holds a text; its path."""
    path = folder / "file"
    path.write_text(text, encoding="utf-8")
    return str(path)
