"""Counters, histograms and their text, against prometheus_client: its parser, and its own series of the same values."""

from __future__ import annotations

from collections.abc import Callable

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from service.series import Counter, Family, Gauge, Histogram, label_text

BOUNDS = (0.001, 0.25, 1.0, 1e6)
VALUES = st.floats(-1e9, 1e9)


def _text(family: Family, **common: str) -> str:
    return "".join(family.lines(label_text(common)))


def _parsed(text: str) -> list[Metric]:
    """Families with their samples in one order, without the times at which prometheus_client began them."""
    families = [family for family in text_string_to_metric_families(text) if not family.name.endswith("_created")]
    for family in families:
        family.samples.sort(key=lambda sample: (sample.name, sorted(sample.labels.items())))
    return families


def _reference(add: Callable[[CollectorRegistry], None]) -> str:
    registry = CollectorRegistry()
    add(registry)
    return generate_latest(registry).decode()


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), VALUES)))
def test_a_histogram_is_that_of_the_client_library(observations: list[tuple[str, float]]) -> None:
    histogram = Histogram("h_seconds", "Text.", BOUNDS, "kind")

    def add(registry: CollectorRegistry) -> None:
        reference = prometheus_client.Histogram("h_seconds", "Text.", ["kind"], buckets=BOUNDS, registry=registry)
        for kind, value in observations:
            histogram.observe(value, kind)
            reference.labels(kind=kind).observe(value)

    expected = _reference(add)
    if observations:  # a family without samples has no title here
        assert _parsed(_text(histogram)) == _parsed(expected)


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_value_at_a_bound_lies_below_it(bound: float) -> None:
    histogram = Histogram("h", "Text.", BOUNDS)
    histogram.observe(bound)
    buckets = [sample for sample in _parsed(_text(histogram))[0].samples if sample.name == "h_bucket"]
    assert {float(sample.labels["le"]) for sample in buckets if sample.value} == {
        *(each for each in BOUNDS if each >= bound),
        float("inf"),
    }


@given(st.lists(st.tuples(st.text(), st.integers(0, 10**9))), st.text())
def test_a_counter_is_that_of_the_client_library_whatever_its_labels_hold(
    amounts: list[tuple[str, int]], model: str
) -> None:
    counter = Counter("c_total", "Text.", "own")

    def add(registry: CollectorRegistry) -> None:
        reference = prometheus_client.Counter("c", "Text.", ["model", "own"], registry=registry)
        for own, amount in amounts:
            counter.add(amount, own)
            reference.labels(model=model, own=own).inc(amount)

    expected = _reference(add)
    if amounts:
        assert _parsed(_text(counter, model=model)) == _parsed(expected)


@given(st.dictionaries(st.text(), st.floats(allow_nan=False)))
def test_a_gauge_reads_back_as_it_was(values: dict[str, float]) -> None:
    gauge = Gauge("g", "Text.", {(label,): value for label, value in values.items()}, "own")
    families = _parsed(_text(gauge))
    found = {sample.labels["own"]: sample.value for family in families for sample in family.samples}
    assert found == values


def test_what_has_no_label_is_there_from_the_start_and_what_has_some_is_not() -> None:
    assert [sample.value for sample in _parsed(_text(Counter("c_total", "Text.")))[0].samples] == [0]
    assert {sample.value for sample in _parsed(_text(Histogram("h", "Text.", BOUNDS)))[0].samples} == {0}
    assert _text(Counter("c_total", "Text.", "own")) == _text(Histogram("h", "Text.", BOUNDS, "own")) == ""


def test_labels_of_all_series_may_change_between_two_scrapes() -> None:
    counter = Counter("c_total", "Text.", "own")
    counter.add(1, "x")
    devices = [_parsed(_text(counter, device=device))[0].samples[0].labels["device"] for device in ("unknown", "cpu")]
    assert devices == ["unknown", "cpu"]
