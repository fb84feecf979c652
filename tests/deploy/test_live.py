"""Debian's Prometheus scrapes an unquantized and a quantized server under load, and every panel has something to show.

The shipped rules and alerts run in it, with a shorter interval. What is asked is asked for one moment of the load,
so that the answers do not depend on when a test runs.
"""

from __future__ import annotations

import math
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.api.support import eventually
from tests.deploy.support import DASHBOARDS, DEPLOY, program, queries, read_yaml, recorded_names, rules, substituted
from tests.e2e.support import ready
from tests.web.support import free_port

pytestmark = pytest.mark.prometheus

SCHEMES = {"none", "w8a16"}
INTERVAL_S = 0.5
LOAD_S = 15
VARIABLES = {"__rate_interval": f"{LOAD_S}s", "model": "pennyweight-demo", "scheme": "none|w8a16"}
SHARED_PROMPT = list(range(100, 164))
NUM_CLIENTS = 4
QUERIES = [(name, *query) for name, dashboard in DASHBOARDS.items() for query in queries(dashboard)]


class Prometheus:
    """A running Prometheus, and one moment of what it knows.

    Attributes:
        moment: Unix time that is asked for.
    """

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=30)
        self.moment = 0.0

    def is_ready(self) -> bool:
        """Whether it takes questions."""
        try:
            return self.client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **parameters: str | float) -> Any:
        """The data of a successful answer of the HTTP API."""
        response = self.client.get(f"/api/v1/{path}", params=parameters)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["status"] == "success"
        assert "warnings" not in answer, answer["warnings"]
        return answer["data"]

    def series(self, expression: str) -> list[tuple[dict[str, str], list[float]]]:
        """Labels and values, a value for each half second of the last two before the moment."""
        times = {"start": self.moment - 2, "end": self.moment, "step": INTERVAL_S}
        found = self.get("query_range", query=expression, **times)["result"]
        return [(series["metric"], [float(value) for _, value in series["values"]]) for series in found]

    def num_scrapes(self) -> float:
        """Scrapes so far of the server that had the fewest."""
        found = self.get("query", query="min(count_over_time(up[1h]))")["result"]
        return float(found[0]["value"][1]) if found else 0


def write_config(folder: Path, targets: list[str]) -> Path:
    """The shipped configuration with other targets and intervals."""
    config = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    milliseconds = f"{round(1000 * INTERVAL_S)}ms"
    config["global"] = dict.fromkeys(config["global"], milliseconds)
    config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def generate(client: httpx.Client, number: int) -> None:
    """One request; some prompts begin alike, some texts are asked for whole, and one in eight is refused."""
    fields: dict[str, Any] = {"prompt": [*SHARED_PROMPT, number % 500 + 5], "max_tokens": 8 + number % 9}
    fields |= {"stream": number % 2 == 0, "ignore_eos": True}
    if number % 8 == 7:
        fields["temperature"] = 3
    response = client.post("/v1/completions", json=fields)
    assert response.status_code == (400 if number % 8 == 7 else 200), response.text


def load(url: str, ended: threading.Event) -> int:
    """Several requests at once, then all of them waited for, so that there are steps of all kinds; their number."""
    number = 0
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        while not ended.is_set():
            list(pool.map(generate, [client] * NUM_CLIENTS, range(number, number + NUM_CLIENTS)))
            number += NUM_CLIENTS
    return number


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus beside both servers, whose load has ended after the moment that is asked for."""
    binary = program("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    port = free_port()
    with ExitStack() as stack:
        clients = [
            stack.enter_context(ready("--quantize", scheme, "--fidelity", "before-ready"))[1]
            for scheme in sorted(SCHEMES)
        ]
        config = write_config(folder, [f"{client.base_url.host}:{client.base_url.port}" for client in clients])
        log = stack.enter_context((folder / "log").open("w"))
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=log,
        )
        stack.callback(process.wait, 60)
        stack.callback(process.terminate)
        running = Prometheus(f"http://127.0.0.1:{port}")
        stack.callback(running.client.close)
        assert eventually(lambda: running.is_ready() or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        ended = threading.Event()
        with ThreadPoolExecutor(len(clients)) as pool:
            loads = [pool.submit(load, str(client.base_url), ended) for client in clients]
            enough = eventually(lambda: running.num_scrapes() >= LOAD_S / INTERVAL_S)
            running.moment = float(running.get("query", query="time()")["result"][1])
            ended.set()
            assert all(pending.result() > 0 for pending in loads)
        assert enough, (folder / "log").read_text()
        yield running


def schemes(found: list[tuple[dict[str, str], list[float]]]) -> set[str]:
    return {labels.get("scheme", "") for labels, _ in found}


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query[0]}: {query[1]['title']} {query[2]['refId']}")
def test_a_panel_shows_finite_figures_of_both_servers(
    query: tuple[str, Mapping[str, Any], Mapping[str, Any]], prometheus: Prometheus
) -> None:
    _, _, target = query
    found = prometheus.series(substituted(target["expr"], VARIABLES))
    assert schemes(found) == (SCHEMES if "{{scheme}}" in target["legendFormat"] else {""})
    names = {part.partition("}")[0] for part in target["legendFormat"].split("{{")[1:]}
    for labels, values in found:
        assert names <= labels.keys()
        assert all(map(math.isfinite, values)), labels


def test_the_dashboards_variables_offer_the_model_and_both_schemes(prometheus: Prometheus) -> None:
    for dashboard in DASHBOARDS.values():
        offered = {}
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                selector, label = variable["query"]["query"].removeprefix("label_values(").rstrip(")").split(", ")
                path = f"label/{label}/values"
                offered[variable["name"]] = prometheus.get(path, **{"match[]": substituted(selector, VARIABLES)})
        assert offered == {"model": ["pennyweight-demo"], "scheme": sorted(SCHEMES)}


@pytest.mark.parametrize("name", sorted(recorded_names()))
def test_a_rule_records_finite_figures_of_both_servers(name: str, prometheus: Prometheus) -> None:
    found = prometheus.series(name)
    assert schemes(found) == SCHEMES
    assert all(math.isfinite(value) for _, values in found for value in values)


def test_ratios_to_the_unquantized_server_are_one_for_itself_and_less_for_the_other_ones_weights(
    prometheus: Prometheus,
) -> None:
    ratios = {
        labels["scheme"]: values[-1]
        for labels, values in prometheus.series("scheme:pennyweight_weight_bytes:ratio_to_none")
    }
    assert ratios["none"] == 1
    (saving,) = {values[-1] for _, values in prometheus.series('pennyweight_weight_saving_ratio{scheme="w8a16"}')}
    assert ratios["w8a16"] == pytest.approx(1 - saving, rel=1e-12)


def test_no_rule_fails_and_no_alert_comes_while_all_is_well(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in found} == recorded_names() | {rule["alert"] for rule in rules("alerts.yml")}
    assert {rule["name"]: rule.get("lastError") for rule in found if rule["health"] != "ok"} == {}
    alerts = prometheus.get("alerts")["alerts"]
    assert [alert for alert in alerts if alert["state"] == "firing"] == []
    assert [values[-1] for _, values in prometheus.series("scheme:pennyweight_alerts_firing:count")] == [0, 0]


def test_a_series_that_nobody_exports_would_be_found_missing(prometheus: Prometheus) -> None:
    assert prometheus.series("pennyweight_no_such_series") == []
