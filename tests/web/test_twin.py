"""Two services on one page: what is the same, what differs, and a twin that is not as it should be."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.api.support import RunningService, run_service
from tests.web.support import (
    SETTINGS,
    Watched,
    figures,
    fill_form,
    free_port,
    generate,
    generated,
    outputs,
    written_text,
)

pytestmark = pytest.mark.browser

Twins = tuple[RunningService, RunningService]
KEY = "bob-0123456789abcdef"
CHOICE = {"temperature": 1.2, "max_tokens": 40, "seed": 3}


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        yield port


def test_both_get_the_same_request_and_the_first_token_that_differs_is_marked(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    expect(page.locator(".bar")).to_have_count(3)
    fill_form(page, **CHOICE)
    generate(page)
    answers = [generated(service, **CHOICE) for service in twins]
    assert outputs(page) == [answer["text"] for answer in answers]
    ids = [answer["token_ids"] for answer in answers]
    index = next(i for i, (one, other) in enumerate(zip(*ids, strict=True)) if one != other)
    expect(page.locator("#difference")).to_contain_text(f"The first token that differs is number {index + 1}.")
    for position, service in enumerate(twins):
        side = page.locator(".side").nth(position)
        common, marked = (
            service.client.post("/detokenize", json={"tokens": part}).json()["prompt"]
            for part in (ids[position][:index], ids[position][index : index + 1])
        )
        assert side.locator("mark").all_text_contents() == [marked]
        assert (side.locator(".output").text_content() or "").startswith(common + marked)
    assert all("tokens/s" in line for line in figures(page))


def test_texts_that_are_the_same_are_called_so(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    fill_form(page, temperature=0, max_tokens=4)
    generate(page)
    assert generated(twins[0], max_tokens=4)["token_ids"] == generated(twins[1], max_tokens=4)["token_ids"]
    expect(page.locator("#difference")).to_contain_text("All 4 tokens are the same.")
    expect(page.locator("mark")).to_have_count(0)


def _check_own_side_goes_on(watched: Watched, own: RunningService, message: str) -> None:
    page = watched.visit(own.url)
    expect(page.locator(".notice")).to_contain_text(message)
    fill_form(page, temperature=0, max_tokens=8)
    generate(page)
    assert outputs(page) == [generated(own, max_tokens=8)["text"], ""]
    assert message in figures(page)[1]
    expect(page.locator(".bar")).to_have_count(2)
    watched.forgive_failed_requests()


def test_a_twin_that_is_down_is_told_and_holds_nothing_up(watched: Watched, browser: Browser) -> None:
    with run_service(SETTINGS | {"twin": f"http://127.0.0.1:{free_port()}"}) as own:
        _check_own_side_goes_on(watched, own, "cannot be reached. It is down, or does not let this page read")


def test_a_twin_that_does_not_let_the_page_read_is_told_what_it_lacks(watched: Watched, twins: Twins) -> None:
    with run_service(SETTINGS | {"twin": twins[1].url}) as own:
        _check_own_side_goes_on(watched, own, f"it needs --cors-origin {own.url}")
    watched.errors = [error for error in watched.errors if "has been blocked by CORS policy" not in error]


def test_a_twin_that_never_answers_is_told_and_holds_nothing_up(watched: Watched, silent_port: int) -> None:
    with run_service(SETTINGS | {"twin": f"http://127.0.0.1:{silent_port}"}) as own:
        _check_own_side_goes_on(watched, own, "did not answer within 5 seconds")


def test_a_twin_with_keys_gets_its_own(watched: Watched, browser: Browser, tmp_path: Path) -> None:
    port = free_port()
    other = {"api_keys_file": written_text(tmp_path, KEY), "cors_origin": f"http://127.0.0.1:{port}"}
    with run_service(SETTINGS | other) as twin, run_service(SETTINGS | {"twin": twin.url}, port=port) as own:
        page = watched.visit(own.url)
        page.get_by_label("API key of the twin").fill(KEY)
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator(".bar")).to_have_count(3)
        fill_form(page, temperature=0, max_tokens=8)
        generate(page)
        assert outputs(page) == [generated(own, max_tokens=8)["text"]] * 2
        expect(page.locator("#difference")).to_contain_text("All 8 tokens are the same.")
        watched.forgive_failed_requests()


def test_a_twin_of_another_model_is_not_compared(watched: Watched, browser: Browser) -> None:
    port = free_port()
    other = {"served_model_name": "other", "cors_origin": f"http://127.0.0.1:{port}"}
    with run_service(SETTINGS | other) as twin, run_service(SETTINGS | {"twin": twin.url}, port=port) as own:
        page = watched.visit(own.url)
        message = "The twin serves other and this service pennyweight-demo: different models cannot be compared."
        expect(page.locator(".notice")).to_have_text(message)
        fill_form(page, temperature=0, max_tokens=8)
        generate(page)
        assert outputs(page) == [generated(own, max_tokens=8)["text"], ""]
        assert figures(page)[1] == message
        assert twin.metric("generated_tokens_total") == 0
