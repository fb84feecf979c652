"""The dashboard can be provisioned, and its panels ask for series that exist, in their unit, by scheme."""

from __future__ import annotations

import json
import re
from itertools import combinations
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
    selectors,
)
from tests.floors import ROOT

GRAFANA = DEPLOY / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "pennyweight.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel, target) for panel in PANELS for target in panel["targets"]]
UNITS = {
    r"_total": "suffix: tokens/s",
    r"_seconds_bucket": "s",
    r"_bytes": "bytes",
    r"_ratio|:ratio_to_none": "percentunit",
}
"""Unit of a panel by the end of the series' name; of the counters, only tokens are shown."""
REPLACED = {"$__rate_interval": "20s", "$model": "pennyweight-demo", "$scheme": "none|w8a16"}
"""What Grafana puts in place of the variables."""


def by_panel(query: tuple[dict[str, Any], dict[str, Any]]) -> str:
    panel, target = query
    return f"{panel['title']} {target['refId']}"


def variables() -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def test_the_dashboard_can_be_provisioned_from_its_file() -> None:
    assert not {"__inputs", "__requires", "id"} & DASHBOARD.keys()
    assert 0 < len(DASHBOARD["uid"]) <= 40
    assert 39 <= DASHBOARD["schemaVersion"] <= 41, "the classic form"
    assert DASHBOARD["editable"] is False


def test_data_source_model_and_scheme_can_be_chosen(exported: list[Sample]) -> None:
    assert list(variables()) == ["datasource", "model", "scheme"]
    assert variables()["scheme"]["multi"], "schemes are compared"
    for name in ("model", "scheme"):
        match = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variables()[name]["query"]["query"])
        assert match, name
        assert any(sample.name == match[1] and match[2] in sample.labels for sample in exported)
        assert match[2] == name


def test_panels_have_their_own_id_and_place() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["targets"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    legends = [target["legendFormat"] for target in panel["targets"]]
    assert len(set(legends)) == len(legends)


def test_the_figures_that_are_compared_are_all_there() -> None:
    shown = {selector.name for _, target in QUERIES for selector in selectors(target["expr"])}
    assert {
        "pennyweight_weight_original_bytes",
        "pennyweight_weight_bytes",
        "pennyweight_weight_saving_ratio",
        "pennyweight_memory_bytes",
        "pennyweight_generated_tokens_total",
        "pennyweight_time_to_first_token_seconds_bucket",
    } <= shown


@pytest.mark.parametrize("query", QUERIES, ids=by_panel)
class TestQuery:
    """One expression of one panel."""

    def test_it_asks_the_chosen_data_source(self, query: tuple[dict[str, Any], dict[str, Any]]) -> None:
        chosen = {"type": "prometheus", "uid": "${datasource}"}
        assert [part["datasource"] for part in query] == [chosen, chosen]

    def test_it_reads_what_is_exported_or_recorded(
        self, query: tuple[dict[str, Any], dict[str, Any]], exported: list[Sample]
    ) -> None:
        _, target = query
        found = selectors(target["expr"])
        assert found
        for selector in found:
            samples = [sample for sample in exported if sample.name == selector.name]
            assert samples or selector.name in recorded_names(), f"{selector.name} is not exported"
            for label, value in selector.matchers.items():
                known = value == f"${label}" or any(sample.labels.get(label) == value for sample in samples)
                assert known, f"{selector.name} has no {label}={value}"
            labels = {label for sample in samples for label in sample.labels} or {"model", "device", "scheme"}
            assert grouping_labels(target["expr"]) <= labels

    def test_it_is_split_by_scheme_and_the_legend_says_so(self, query: tuple[dict[str, Any], dict[str, Any]]) -> None:
        _, target = query
        assert "{{scheme}}" in target["legendFormat"]
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= grouping_labels(target["expr"])
        for selector in selectors(target["expr"]):
            assert selector.matchers["model"] == "$model"
            assert selector.matchers["scheme"] == "$scheme"

    def test_its_unit_is_that_of_the_series(self, query: tuple[dict[str, Any], dict[str, Any]]) -> None:
        panel, target = query
        for selector in selectors(target["expr"]):
            (unit,) = [unit for end, unit in UNITS.items() if re.search(f"(?:{end})$", selector.name)]
            assert panel["fieldConfig"]["defaults"]["unit"] == unit

    def test_a_counter_is_read_as_a_rate(self, query: tuple[dict[str, Any], dict[str, Any]]) -> None:
        _, target = query
        for selector in selectors(target["expr"]):
            is_counter = selector.name.endswith(("_total", "_bucket"))
            assert is_counter == (f"rate({selector.name}" in target["expr"])
            assert is_counter == ("[$__rate_interval]" in target["expr"])


def test_promtool_parses_every_expression(tmp_path: Path) -> None:
    rules = []
    for number, (_, target) in enumerate(QUERIES):
        expression = target["expr"]
        for variable, value in REPLACED.items():
            expression = expression.replace(variable, value)
        assert "$" not in expression
        rules.append({"record": f"query:{number}", "expr": expression})
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    result = promtool("check", "rules", path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_grafana_finds_prometheus_and_the_dashboard_where_compose_puts_them() -> None:
    services = read_compose(ROOT / "docker-compose.yml")["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    (provider,) = read_yaml(GRAFANA / "provisioning" / "dashboards" / "pennyweight.yml")["providers"]
    folder = provider["options"]["path"]
    assert mounts["./deploy/grafana/dashboards"] == folder
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/pennyweight.json"
    (source,) = read_yaml(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0].rsplit(':', 1)[1]}"
    scraped = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
