"""Take the README's pictures of the page, of services of their own, on a machine that does nothing else.

python -m tests.web.screenshots docs/images
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.e2e.support import ready
from tests.web.support import Watched, fill_form, free_port, generate, open_browser

MIXED = "w4a16-g64,*.down_proj=w8a16"
NUM_TEXTS = 3
VIEWPORT = {"width": 1200, "height": 900}


def take(folder: Path) -> None:
    """Write both pictures."""
    port = free_port()
    own_url = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        browser = stack.enter_context(open_browser())
        _, other = stack.enter_context(ready("--quantize", "none", "--cors-origin", own_url))
        twin_url = str(other.base_url).rstrip("/")
        stack.enter_context(ready("--port", str(port), "--twin", twin_url))
        page = Watched(browser, viewport=VIEWPORT).visit(own_url)
        _use(page)
        page.screenshot(path=folder / "page_twins.png", full_page=True)
        _, mixed = stack.enter_context(ready("--quantize", MIXED))
        page = Watched(browser, viewport=VIEWPORT, color_scheme="dark").visit(str(mixed.base_url).rstrip("/"))
        _use(page)
        page.screenshot(path=folder / "page_dark.png", full_page=True)


def _use(page: Page) -> None:
    """Some texts, so that there is something to see, until the live figures know of the last."""
    fill_form(page, temperature=0.7, max_tokens=60)
    for seed in range(1, NUM_TEXTS + 1):
        fill_form(page, seed=seed)
        generate(page)
    expect(page.locator("#live-table tr", has_text="speed now").locator("td").first).to_have_text("0 tokens/s")
    page.get_by_role("listbox").first.get_by_role("option").nth(7).focus()


if __name__ == "__main__":
    take(Path(sys.argv[1]))
