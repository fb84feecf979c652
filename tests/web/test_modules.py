"""Parts of the page by themselves, in the browser that runs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.api.support import RunningService
from tests.web.support import Watched

pytestmark = pytest.mark.browser

Twins = tuple[RunningService, RunningService]
EVENTS = 'data: {"text": "é"}\n\n: a comment\n\ndata: one\ndata: two\r\n\r\ndata:[DONE]\n\n'
READ = """async ([text, size]) => {
    const { eventData } = await import('/web/sse.js');
    const bytes = new TextEncoder().encode(text);
    const stream = new ReadableStream({
        start(controller) {
            for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
            controller.close();
        },
    });
    const found = [];
    for await (const data of eventData(stream)) found.push(data);
    return found;
}"""
QUANTILES = """async ([older, newer, shares]) => {
    const { Scrape, growth, quantile } = await import('/web/metrics.js');
    const [one, two] = [new Scrape(older), new Scrape(newer)];
    return [shares.map(share => quantile(one, two, 'x_seconds', share)), growth(one, two, 'n_total'),
        two.value('weight_bytes', { kind: 'a "quoted", one\\\\' }), two.value('none')];
}"""
FORMATTED = """async () => {
    const { bytes, number, seconds, percent, rate } = await import('/web/format.js');
    return [bytes(0), bytes(1023), bytes(1024), bytes(11540992), bytes(null), number(1234.5), number(0.01234),
        seconds(0.0123), seconds(2), percent(0.4929), rate(36.54), rate(NaN)];
}"""
DIFFERENCES = """async cases => {
    const { firstDifference } = await import('/web/generation.js');
    return cases.map(([one, other, isComplete]) =>
        firstDifference({ tokenIds: one, isComplete }, { tokenIds: other, isComplete }));
}"""


@pytest.fixture(scope="module")
def run(browser: Browser, twins: Twins) -> Iterator[Any]:
    """Evaluates in the page."""
    watched = Watched(browser)
    yield watched.visit(twins[0].url).evaluate
    watched.close()
    assert watched.errors == []


def _histogram(counts: list[int], total: float) -> str:
    bounds = ("0.1", "0.2", "+Inf")
    lines = [f'pennyweight_x_seconds_bucket{{le="{b}",model="m"}} {c}' for b, c in zip(bounds, counts, strict=True)]
    kind = r'pennyweight_weight_bytes{kind="a \"quoted\", one\\",device="cpu"} 1.5e+06'
    return "\n".join(["# TYPE x histogram", *lines, f"pennyweight_n_total {total}", kind])


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_found_wherever_the_stream_is_cut(run: Any, size: int) -> None:
    assert run(READ, [EVENTS, size]) == ['{"text": "é"}', "one\ntwo", "[DONE]"]


def test_percentiles_are_of_what_came_between_two_scrapes(run: Any) -> None:
    older, newer = _histogram([5, 5, 5], 10), _histogram([15, 25, 25], 17)
    shares, grown, quoted, missing = run(QUANTILES, [older, newer, [0.25, 0.5, 0.75, 1]])
    assert shares == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert (grown, missing) == (7, None)
    assert quoted == 1.5e6


def test_nothing_observed_is_no_percentile_and_a_restart_no_growth(run: Any) -> None:
    text = _histogram([5, 5, 5], 10)
    assert run(QUANTILES, [text, text, [0.5]])[0] == [None]
    assert run(QUANTILES, [text, _histogram([0, 0, 0], 1), [0.5]])[:2] == [[None], None]


def test_figures_are_short_and_have_units(run: Any) -> None:
    assert run(FORMATTED) == [
        *("0 bytes", "1023 bytes", "1.00 KiB", "11.0 MiB", "–", "1235", "0.0123"),
        *("12.3 ms", "2 s", "49.3 %", "36.5 tokens/s", "–"),
    ]


def test_texts_differ_at_a_token_or_where_one_has_ended(run: Any) -> None:
    cases: list[list[Any]] = [
        [[1, 2, 3], [1, 5, 3], False],
        [[1, 2], [1, 2], True],
        [[1, 2], [1, 2, 3], False],
        [[1, 2], [1, 2, 3], True],
        [[], [1], True],
    ]
    assert run(DIFFERENCES, cases) == [1, None, None, 2, 0]
