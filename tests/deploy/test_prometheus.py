"""Prometheus accepts its configuration and rules, and the rules compute what they say from series that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.samples import Sample

from tests.deploy.support import (
    DEPLOY,
    grouping_labels,
    promtool,
    read_compose,
    read_yaml,
    recorded_names,
    seconds,
    selectors,
)
from tests.floors import ROOT

CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
RULES = DEPLOY / "prometheus" / "rules.yml"
CASES = Path(__file__).parent / "rules_test.yml"


def rules() -> list[dict[str, Any]]:
    return [rule for group in read_yaml(RULES)["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", CONFIG), ("check", "rules", RULES), ("test", "rules", CASES)],
    ids=["configuration", "rules", "cases of the rules"],
)
def test_promtool_accepts(arguments: tuple[str | Path, ...]) -> None:
    result = promtool(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr


def test_promtool_finds_a_mistake(tmp_path: Path) -> None:
    broken = tmp_path / "rules.yml"
    broken.write_text(RULES.read_text(encoding="utf-8").replace("sum by (", "sum by by (", 1), encoding="utf-8")
    assert promtool("check", "rules", broken).returncode == 1


def test_every_rule_has_a_case() -> None:
    expected = {case["expr"] for test in read_yaml(CASES)["tests"] for case in test["promql_expr_test"]}
    untested = recorded_names() - expected
    assert untested == {"scheme:pennyweight_resident_bytes:avg"}, "its ratio is tested"


def test_the_twins_of_compose_are_scraped_at_their_port() -> None:
    services = read_compose(ROOT / "docker-compose.yml")["services"]
    (job,) = read_yaml(CONFIG)["scrape_configs"]
    (targets,) = job["static_configs"]
    twins = {name: service["ports"][0].rsplit(":", 1)[1] for name, service in services.items() if "build" in service}
    assert set(targets["targets"]) == {f"{name}:{port}" for name, port in twins.items()}


def test_a_scrape_ends_before_the_next_begins() -> None:
    timing = read_yaml(CONFIG)["global"]
    assert seconds(timing["scrape_timeout"]) < seconds(timing["scrape_interval"])


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["record"])
def test_a_rule_reads_series_and_labels_that_are_exported(rule: dict[str, str], exported: list[Sample]) -> None:
    common = {"model", "device", "scheme"}
    labels: set[str] = set(common)
    for selector in selectors(rule["expr"]):
        samples = [sample for sample in exported if sample.name == selector.name]
        assert samples or selector.name in recorded_names(), f"{selector.name} is not exported"
        for label, value in selector.matchers.items():
            assert label in common or any(sample.labels.get(label) == value for sample in samples), (label, value)
        labels |= {label for sample in samples for label in sample.labels}
    assert grouping_labels(rule["expr"]) <= labels
