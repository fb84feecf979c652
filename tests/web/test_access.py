"""Who can use the page: by keyboard, in the dark, on a narrow screen, by names; and what the policy holds back."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, Error, Page, expect

from tests.api.support import RunningService
from tests.web.support import FAILED_REQUEST, Watched, fill_form, generate, generated, outputs, wait_for_end

pytestmark = pytest.mark.browser

Twins = tuple[RunningService, RunningService]
UNNAMED = """[...document.querySelectorAll('input, textarea, select, button, [tabindex="0"], [role=img], svg')]
    .filter(node => !(node.labels?.length || node.getAttribute('aria-label') || node.getAttribute('aria-labelledby')
        || (node.tagName === 'BUTTON' && node.textContent.trim())))
    .map(node => node.outerHTML)"""
CONTRAST = """() => {
    const luminance = (node, property) => {
        const canvas = document.createElement('canvas').getContext('2d');
        canvas.fillStyle = getComputedStyle(node)[property];
        canvas.fillRect(0, 0, 1, 1);
        const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => part / 255);
        const [r, g, b] = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const card = luminance(document.querySelector('.card'), 'backgroundColor');
    return ['h2', '.hint', '.figures', '.legend'].map(name => {
        const text = luminance(document.querySelector(name), 'color');
        return (Math.max(card, text) + 0.05) / (Math.min(card, text) + 0.05);
    });
}"""


def _brightness(page: Page) -> int:
    colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(","))


def test_everything_works_without_a_mouse(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    press = page.keyboard.press
    press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    press("Enter")
    expect(page.get_by_label("Prompt")).to_be_focused()
    for value in ("8", "0"):
        press("Tab")
        press("Control+A")
        page.keyboard.type(value)
    page.get_by_label("Prompt").focus()
    press("Control+Enter")
    wait_for_end(page)
    assert outputs(page)[0] == generated(twins[0], max_tokens=8)["text"]
    cells = page.get_by_role("listbox").first.get_by_role("option")
    cells.first.focus()
    for key, index in (("ArrowRight", 1), ("ArrowLeft", 0), ("End", cells.count() - 1), ("Home", 0)):
        press(key)
        expect(cells.nth(index)).to_be_focused()
        expect(page.locator("#layer-detail")).to_have_text(cells.nth(index).get_attribute("aria-label") or "no label")
    assert page.locator(".strip").first.locator("[tabindex='0']").count() == 1


def test_all_that_can_be_used_has_a_name(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    expect(page.locator(".bar")).to_have_count(3)
    assert page.evaluate(UNNAMED) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_until_somebody_chooses_and_the_choice_is_kept(
    browser: Browser, twins: Twins, scheme: str
) -> None:
    watched = Watched(browser, color_scheme=scheme)
    page = watched.visit(twins[0].url)
    assert (_brightness(page) > 3 * 128) == (scheme == "light")
    other = "dark" if scheme == "light" else "light"
    page.get_by_label("Colours").select_option(other)
    assert (_brightness(page) > 3 * 128) == (scheme == "dark")
    page.reload()
    page.wait_for_selector(f"html[data-theme={other}]")
    expect(page.get_by_label("Colours")).to_have_value(other)
    page.get_by_label("Colours").select_option("auto")
    assert (_brightness(page) > 3 * 128) == (scheme == "light")
    watched.close()
    assert watched.errors == []


def test_text_stands_out_as_accessibility_guidelines_ask(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    fill_form(page, max_tokens=2)
    generate(page)
    for colours in ("light", "dark"):
        page.get_by_label("Colours").select_option(colours)
        assert min(page.evaluate(CONTRAST)) >= 4.5


def test_a_narrow_screen_scrolls_in_one_direction_only(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    expect(page.locator(".bar")).to_have_count(3)
    for width in (320, 390, 768):  # 320: what accessibility guidelines ask for
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_policy_stops_markup_scripts_and_other_hosts(watched: Watched, twins: Twins) -> None:
    page = watched.visit(twins[0].url)
    for breach in ("document.body.innerHTML = '<b>x</b>'", "setTimeout('1')"):
        with pytest.raises(Error, match=r"Trusted|CSP|unsafe-eval"):
            page.evaluate(f"() => {{ {breach} }}")
    with pytest.raises(Error, match="Failed to fetch"):
        page.evaluate("fetch('http://127.0.0.2:9/')")
    page.evaluate("() => { const s = document.createElement('style'); s.append('*{}'); document.head.append(s); }")
    assert page.evaluate("document.styleSheets.length") == 1
    assert watched.errors
    assert not [error for error in watched.errors if FAILED_REQUEST in error]
    watched.errors.clear()
