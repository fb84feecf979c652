"""The dashboard can be provisioned, and its panels ask for series that exist, in their unit, by scheme."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.deploy.support import (
    DASHBOARDS,
    DEPLOY,
    GRAFANA,
    grouping_labels,
    promtool,
    queries,
    read_compose,
    read_yaml,
    recorded_names,
    rules,
    selectors,
    substituted,
)
from tests.floors import ROOT

DASHBOARD = DASHBOARDS["pennyweight"]
RULE_CASES = Path(__file__).parent / "rules_test.yml"
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS_DOWN = "Targets that are down"
"""The one panel whose series, `up`, is Prometheus' own: what is down has no scheme."""
ALL_QUERIES = queries(DASHBOARD)
QUERIES = [query for query in ALL_QUERIES if query[0]["title"] != TARGETS_DOWN]
UNITS = {
    r"_tokens_total": "suffix: tokens/s",
    r"pennyweight_requests\w*_total": "reqps",
    r"_(preemptions|step_errors|nonfinite_logits)_total": "cps",
    r"_seconds(_bucket|_sum|_count)?": "s",
    r"_bytes": "bytes",
    r"_bits_per_parameter": "suffix: bit",
    r"_nats": "suffix: nats",
    r"_ratio|ratio_to_none|ratio\d+m": "percentunit",
    r"_(running|waiting|kv_blocks|ready|info)|batch_(sequences|tokens)_(sum|count)|:count": "short",
}
"""Unit of a panel by the end of the series' name, counters as rates."""
REPLACED = {"__rate_interval": "20s", "model": "pennyweight-demo", "scheme": "none|w8a16"}
"""What Grafana puts in place of the variables."""
NOT_SHOWN: set[str] = set()
"""Metrics that are for other readers than the dashboard, the rules and the alerts."""
ROWS = ["What quantization saves", "Latency and throughput", "Load and KV memory", "Health and errors"]
RATIOS = {
    "Generated tokens per second": "Generated tokens beside the unquantized server",
    "Time to first token": "Time to first token beside the unquantized server",
    "Time between tokens": "Time between tokens beside the unquantized server",
}
"""Panels that have both twins on one axis, and those that divide one by the other."""


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


def in_row(title: str) -> list[dict[str, Any]]:
    """Panels below a row and above the next."""
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    begin = titles.index(title) + 1
    end = titles.index(ROWS[ROWS.index(title) + 1]) if title != ROWS[-1] else len(titles)
    return DASHBOARD["panels"][begin:end]  # type: ignore[no-any-return]


def test_the_rows_come_in_the_order_of_what_the_product_is_for() -> None:
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == ROWS
    places = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"]]
    assert places == sorted(places)


def test_the_saving_comes_first() -> None:
    found = selectors(" ".join(target["expr"] for panel in in_row(ROWS[0]) for target in panel["targets"]))
    assert {
        "pennyweight_weight_original_bytes",
        "pennyweight_weight_bytes",
        "pennyweight_weight_saving_ratio",
        "pennyweight_weight_bits_per_parameter",
        "pennyweight_memory_bytes",
    } <= {selector.name for selector in found}
    assert DASHBOARD["panels"][1]["title"] == "Weight saving"


@pytest.mark.parametrize("title", RATIOS)
def test_a_speed_stands_beside_its_ratio_to_the_unquantized_server(title: str) -> None:
    panels = {panel["title"]: panel for panel in in_row(ROWS[1])}
    speed, ratio = panels[title], panels[RATIOS[title]]
    assert speed["gridPos"]["y"] == ratio["gridPos"]["y"]
    assert speed["gridPos"]["x"] + speed["gridPos"]["w"] == ratio["gridPos"]["x"]
    assert [target["legendFormat"] for target in speed["targets"]] == [
        target["legendFormat"] for target in ratio["targets"]
    ]
    for target in ratio["targets"]:
        assert all(selector.name.endswith("ratio_to_none") for selector in selectors(target["expr"]))


def test_every_exported_metric_is_used_in_a_panel_or_a_rule(exposition: str) -> None:
    expressions = [target["expr"] for _, target in QUERIES]
    expressions += [rule["expr"] for file_name in ("rules.yml", "alerts.yml") for rule in rules(file_name)]
    used = {selector.name for expression in expressions for selector in selectors(expression)}
    families = {family.name for family in text_string_to_metric_families(exposition)}
    endings = ("", "_total", "_bucket", "_sum", "_count")
    unused = {name for name in families if not used & {name + ending for ending in endings}}
    assert unused == NOT_SHOWN


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
            for label in selector.matchers.keys() - {"model", "scheme"}:
                assert selector.finds(label, {sample.labels[label] for sample in samples}), (selector.name, label)
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
            is_counter = selector.name.endswith(("_total", "_bucket", "_sum", "_count"))
            assert is_counter == (f"rate({selector.name}" in target["expr"])
            assert is_counter == ("[$__rate_interval]" in target["expr"])


def test_targets_that_are_down_are_counted_as_a_case_of_the_rules_expects() -> None:
    """The alert about them has no scheme, so that the panel of alerts by scheme cannot show it."""
    (panel,) = [panel for panel in in_row(ROWS[3]) if panel["title"] == TARGETS_DOWN]
    (target,) = panel["targets"]
    (down,) = [rule for rule in rules("alerts.yml") if rule["alert"] == "PennyweightDown"]
    assert target["expr"] == f"count({down['expr']}) or vector(0)"
    cases = [case for test in read_yaml(RULE_CASES)["tests"] for case in test["promql_expr_test"]]
    values = [sample["value"] for case in cases if case["expr"] == target["expr"] for sample in case["exp_samples"]]
    assert values == [0, 1]


def test_promtool_parses_every_expression(tmp_path: Path) -> None:
    rules = []
    for number, (_, target) in enumerate(ALL_QUERIES):
        rules.append({"record": f"query:{number}", "expr": substituted(target["expr"], REPLACED)})
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
