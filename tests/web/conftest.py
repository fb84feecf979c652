"""One browser for all tests of the page, and the services that most of them look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from playwright.sync_api import Browser

from tests.api.support import RunningService, run_service
from tests.web.support import SETTINGS, Watched, free_port, open_browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium."""
    with open_browser() as browser:
        yield browser


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    """A page; at the end its console must hold no error, and so no breach of the policy."""
    watched = Watched(browser)
    yield watched
    watched.close()
    assert watched.errors == []


@pytest.fixture(scope="session")
def twins(browser: Browser) -> Iterator[tuple[RunningService, RunningService]]:
    """The demo model as `w8a16`, whose page compares it with the second one, which is `none`.

    The browser comes first: without one there is nothing to start.
    """
    port = free_port()
    with ExitStack() as stack:
        other = {"quantize": "none", "cors_origin": f"http://127.0.0.1:{port}"}
        twin = stack.enter_context(run_service(SETTINGS | other))
        own = stack.enter_context(run_service(SETTINGS | {"twin": twin.url}, port=port))
        yield own, twin
