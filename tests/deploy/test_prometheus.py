"""Prometheus accepts its configuration, rules and alerts, which compute what they say from series that exist."""

from __future__ import annotations

from http import HTTPStatus
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
    rules,
    seconds,
    selectors,
)
from tests.floors import ROOT

CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
RULES = DEPLOY / "prometheus" / "rules.yml"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
CASES = Path(__file__).parent / "rules_test.yml"
ALERT_CASES = Path(__file__).parent / "alerts_test.yml"
STATUSES = {str(int(status)) for status in HTTPStatus}
COMMON = {"model", "device", "scheme"}
OF_THE_TARGET = {"job", "instance"}
"""Labels that Prometheus adds."""


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", CONFIG),
        ("check", "rules", RULES, ALERTS),
        ("test", "rules", CASES),
        ("test", "rules", ALERT_CASES),
    ],
    ids=["configuration", "rules", "cases of the rules", "cases of the alerts"],
)
def test_promtool_accepts(arguments: tuple[str | Path, ...]) -> None:
    result = promtool(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr


def test_promtool_finds_a_mistake(tmp_path: Path) -> None:
    broken = tmp_path / "rules.yml"
    broken.write_text(RULES.read_text(encoding="utf-8").replace("sum by (", "sum by by (", 1), encoding="utf-8")
    assert promtool("check", "rules", broken).returncode == 1


def test_promtool_objects_to_no_metric_but_the_bits(exposition: str) -> None:
    result = promtool("check", "metrics", stdin=exposition)
    objections = result.stdout + result.stderr
    assert [line.split()[0] for line in objections.splitlines()] == ["pennyweight_weight_bits_per_parameter"]
    assert "bytes" in objections, "it would have them in bytes, which nobody counts parameters in"


def test_promtool_objects_to_a_metric_without_a_unit_or_help(exposition: str) -> None:
    result = promtool(
        "check", "metrics", stdin=f"{exposition}# TYPE pennyweight_wait_ms gauge\npennyweight_wait_ms 1\n"
    )
    assert result.returncode == 3
    assert "pennyweight_wait_ms" in result.stderr


def test_every_rule_has_a_case() -> None:
    expected = {case["expr"] for test in read_yaml(CASES)["tests"] for case in test["promql_expr_test"]}
    untested = recorded_names() - expected
    assert untested == {"scheme:pennyweight_resident_bytes:avg"}, "its ratio is tested"


def test_the_twins_of_compose_are_scraped_at_their_port() -> None:
    services = read_compose(ROOT / "docker-compose.yml")["services"]
    (job,) = read_yaml(CONFIG)["scrape_configs"]
    (targets,) = job["static_configs"]
    twins = {
        name: service["ports"][0].rsplit(":", 1)[1]
        for name, service in services.items()
        if "build" in service and "profiles" not in service
    }
    assert twins
    assert set(targets["targets"]) == {f"{name}:{port}" for name, port in twins.items()}


def test_a_scrape_ends_before_the_next_begins() -> None:
    timing = read_yaml(CONFIG)["global"]
    assert seconds(timing["scrape_timeout"]) < seconds(timing["scrape_interval"])


def test_rules_and_alerts_are_read() -> None:
    assert {CONFIG.parent / name for name in read_yaml(CONFIG)["rule_files"]} == {RULES, ALERTS}


def test_every_alert_has_a_case_in_which_it_comes_and_one_in_which_it_does_not() -> None:
    cases = [case for test in read_yaml(ALERT_CASES)["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules("alerts.yml")}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_a_case_finds_an_alert_that_comes_late(tmp_path: Path) -> None:
    for path in (RULES, ALERTS):
        late = path.read_text(encoding="utf-8").replace("for: 2m", "for: 9m")
        (tmp_path / path.name).write_text(late, encoding="utf-8")
    cases = ALERT_CASES.read_text(encoding="utf-8").replace("../../deploy/prometheus/", "")
    (tmp_path / ALERT_CASES.name).write_text(cases, encoding="utf-8")
    assert promtool("test", "rules", tmp_path / ALERT_CASES.name).returncode == 1


@pytest.mark.parametrize("rule", rules("alerts.yml"), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_it_is_about(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("Pennyweight"), "the rule that counts those that fire goes by the name"
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    summary = rule["annotations"]["summary"]
    assert "{{ $labels." in summary
    assert summary.endswith(".")


def test_the_alert_about_targets_asks_for_their_job() -> None:
    (job,) = read_yaml(CONFIG)["scrape_configs"]
    (down,) = [rule for rule in rules("alerts.yml") if rule["alert"] == "PennyweightDown"]
    assert down["expr"] == f'up{{job="{job["job_name"]}"}} == 0'


@pytest.mark.parametrize(
    "rule", rules("rules.yml") + rules("alerts.yml"), ids=lambda rule: rule.get("record") or rule.get("alert")
)
def test_a_rule_reads_series_and_labels_that_are_exported(rule: dict[str, Any], exported: list[Sample]) -> None:
    labels = COMMON | OF_THE_TARGET
    for selector in selectors(rule["expr"]):
        samples = [sample for sample in exported if sample.name == selector.name]
        assert samples or selector.name in recorded_names(), f"{selector.name} is not exported"
        for label in selector.matchers.keys() - COMMON:
            values = {sample.labels[label] for sample in samples}
            assert selector.finds(label, STATUSES if label == "status" else values), (selector.name, label)
        labels |= {label for sample in samples for label in sample.labels}
    assert grouping_labels(rule["expr"]) <= labels
