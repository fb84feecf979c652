"""The page of a service as somebody in front of a browser finds it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from service.loading.progress import Phase
from tests.api.support import RunningService, eventually, run_service, write_chat_checkpoint
from tests.models import write_checkpoint
from tests.web.support import (
    PROMPT,
    SETTINGS,
    Watched,
    figures,
    fill_form,
    generate,
    generated,
    notices,
    outputs,
    serve_phases,
    written_text,
)

pytestmark = pytest.mark.browser

Twins = tuple[RunningService, RunningService]
KEY = "alice-0123456789abc"
MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def talker(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A tiny model with a chat template, a name that is markup, and a key."""
    folder = tmp_path_factory.mktemp("talker")
    model = write_chat_checkpoint(folder / "talker")
    settings = {"model": str(model), "quantize": "none", "served_model_name": MARKUP}
    with run_service(SETTINGS | settings | {"api_keys_file": written_text(folder, KEY)}) as service:
        yield service


def _enter_key(page: Page, key: str) -> None:
    page.get_by_label("API key of this service").fill(key)
    page.get_by_role("button", name="Use this key").click()


def test_memory_and_layers_are_those_of_the_load_report(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    report = twins[0].client.get("/v1/quantization").json()
    saved = page.locator("#memory-table tr", has_text="saved").locator("td").first
    expect(saved).to_have_text(f"{100 * report['saving_ratio']:.1f} %")
    page.get_by_label("with the memory for keys and values").uncheck()
    expect(page.locator(".bar")).to_have_count(3)
    widths = page.evaluate(
        "[...document.querySelectorAll('.bar')].map(bar => [...bar.children].map(p => p.offsetWidth))"
    )
    original, quantized = widths[:2]
    share = report["weight_bytes"]["total"] / report["original_bytes"]
    assert sum(quantized) == pytest.approx(share * sum(original), abs=len(quantized) + 1)
    cells = page.get_by_role("listbox").first.get_by_role("option")
    assert cells.count() == len(report["layers"])
    for index in (0, len(report["layers"]) - 1):
        layer = report["layers"][index]
        cells.nth(index).hover()
        expect(page.locator("#layer-detail")).to_contain_text(f"{layer['name']}: {layer['scheme']}, error ")
    assert watched.origins == {twins[0].url, twins[1].url}


def test_the_memory_for_keys_and_values_can_be_drawn_too(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    box = page.get_by_label("with the memory for keys and values")
    expect(page.locator(".bar")).to_have_count(3)
    box.set_checked(not box.is_checked())
    expect(page.locator(".bar .kv")).to_have_count(2 if box.is_checked() else 0)


def test_a_text_is_what_the_route_gives_and_its_speed_is_told(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    fill_form(page, temperature=0, max_tokens=32)
    generate(page)
    assert outputs(page)[0] == generated(twins[0])["text"]
    assert re.fullmatch(r"32 tokens · [\d.,]+ tokens/s · first after [\d.]+ m?s · length", figures(page)[0])


def test_a_chosen_seed_draws_the_same_again(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    fill_form(page, temperature=1.5, max_tokens=12, top_p=0.95, seed=5)
    generate(page)
    expect(page.locator("#difference")).to_contain_text("Seed 5.")
    answer = generated(twins[0], temperature=1.5, max_tokens=12, top_p=0.95, seed=5)
    assert outputs(page)[0] == answer["text"]


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_cancel_ends_the_requests_on_both_services(watched: Watched, twins: Twins, by: str) -> None:
    page = watched.visit(twins[0].url)
    before = [service.metric("requests_finished_total", reason="abort") for service in twins]
    fill_form(page, temperature=1, max_tokens=900, seed=1)
    page.get_by_role("button", name="Generate").click()
    for output in page.locator(".output").all():
        expect(output).not_to_be_empty()
    if by == "button":
        page.get_by_role("button", name="Cancel").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".figures")).to_contain_text([r"· cancelled"] * 2)
    assert eventually(
        lambda: (
            [service.metric("requests_finished_total", reason="abort") for service in twins]
            == [count + 1 for count in before]
        )
    )
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_load_and_latency_are_followed(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    latency = page.locator("#live-table tr", has_text="between tokens").locator("td").first
    fill_form(page, temperature=0, max_tokens=64)
    generate(page)
    expect(latency).to_have_text(re.compile(r"[\d.]+ m?s / [\d.]+ m?s"))
    expect(page.locator("#live-chart polyline").first).to_have_attribute("points", re.compile(r"\d.* \d"))


def test_what_the_service_refuses_is_told_in_its_words(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    fill_form(page, max_tokens=99_999)
    generate(page)
    message = (
        twins[0].client.post("/generate", json={"prompt": PROMPT, "max_tokens": 99_999}).json()["error"]["message"]
    )
    assert figures(page)[0].endswith(message)
    watched.forgive_failed_requests()


def test_a_key_is_asked_for_kept_for_the_tab_and_used(watched: Watched, talker: RunningService) -> None:
    page = watched.page
    page.goto(f"{talker.url}/")
    expect(page.locator(".notice")).to_contain_text("API key")
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    _enter_key(page, "wrong-0123456789abc")
    expect(page.get_by_label("API key of this service")).to_be_visible()
    _enter_key(page, KEY)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    expect(page.locator(".notice")).to_have_count(0)
    expect(page.locator("#model")).to_contain_text(MARKUP)
    assert page.locator("img").count() == 0
    assert page.evaluate("Object.values(sessionStorage)") == [KEY]
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    watched.forgive_failed_requests()


def test_a_chat_is_what_the_route_of_chats_gives(watched: Watched, talker: RunningService) -> None:
    page = watched.page
    page.goto(f"{talker.url}/")
    _enter_key(page, KEY)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    page.get_by_label("Chat").check()
    fill_form(page, prompt="The sea", temperature=0, max_tokens=12)
    generate(page)
    body = {"messages": [{"role": "user", "content": "The sea"}], "temperature": 0, "max_tokens": 12}
    answer = talker.client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}).json()
    assert outputs(page) == [answer["choices"][0]["message"]["content"]]
    watched.forgive_failed_requests()


def test_without_a_chat_template_there_is_no_chat(watched: Watched, browser: Browser, tmp_path: Path) -> None:
    model = write_checkpoint("llama", tmp_path / "tiny")
    (model / "chat_template.jinja").unlink()
    with run_service(SETTINGS | {"model": str(model)}) as service:
        page = watched.visit(service.url)
        expect(page.get_by_label("Chat")).to_be_disabled()
        expect(page.get_by_text("This model has no chat template.")).to_be_visible()


def test_progress_failure_and_draining_are_shown(watched: Watched) -> None:
    with serve_phases() as (url, progress):
        progress.enter(Phase.LOAD, 4 * 2**20)
        progress.advance(2**20)
        page = watched.page
        page.goto(f"{url}/")
        expect(page.locator("#loading-text")).to_contain_text("load, 1.00 MiB of 4.00 MiB")
        expect(page.get_by_role("progressbar", name="Loading")).to_have_attribute("value", str(2**20))
        expect(page.get_by_role("button", name="Generate")).to_be_disabled()
        progress.enter(Phase.WARMUP)
        expect(page.locator("#loading-text")).to_contain_text("warmup, ")
        progress.enter(Phase.FAILED)
        expect(page.locator(".notice")).to_have_text("This service has failed; its log has the reason.")
        expect(page.locator("#loading")).to_be_hidden()
        progress.enter(Phase.DRAINING)
        expect(page.locator(".notice")).to_contain_text("This service is ending")
    expect(page.locator(".notice")).to_have_text("This service cannot be reached.")
    assert notices(page) == ["This service cannot be reached."]
    watched.forgive_failed_requests()
