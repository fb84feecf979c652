"""Reading the files of a deployment as its programs do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.floors import ROOT

DEPLOY = ROOT / "deploy"
GRAFANA = DEPLOY / "grafana"
DASHBOARDS = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (GRAFANA / "dashboards").glob("*.json")
}
REQUIRE_TOOLS = "REQUIRE_TEST_TOOLS"

_SERIES = re.compile(r"\b(?P<name>(?:scheme:)?pennyweight_[\w:]+)\s*(?:\{(?P<matchers>[^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!=|!~|=)\s*"([^"]*)"')
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")


def read_yaml(path: Path) -> Any:
    """One YAML document."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_compose(path: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A compose file with its variables replaced, `${NAME}` and `${NAME:-default}`, in values and after parsing."""
    values = environment or {}

    def replaced(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: replaced(value) for key, value in node.items()}
        if isinstance(node, list):
            return [replaced(value) for value in node]
        if isinstance(node, str):
            return _VARIABLE.sub(lambda match: values.get(match["name"]) or match["default"] or "", node)
        return node

    compose: dict[str, Any] = replaced(read_yaml(path))
    return compose


def seconds(duration: str) -> int:
    """Seconds of a duration such as `45s` or `15m`."""
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def program(name: str) -> str:
    """A program of Prometheus; without it the test is skipped, unless the environment says that it must be there."""
    found = shutil.which(name)
    if found is None:
        message = f"{name} is not installed (Debian's package prometheus has it)"
        if os.environ.get(REQUIRE_TOOLS) == "1":
            pytest.fail(f"{message}, and {REQUIRE_TOOLS}=1")
        pytest.skip(message)
    return found


def promtool(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool."""
    command = [program("promtool"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)


@dataclass(frozen=True, slots=True)
class Selector:
    """A series in a PromQL expression: its name and, for each label matcher, label and value or regular expression."""

    name: str
    matchers: dict[str, str]

    def finds(self, label: str, values: set[str]) -> bool:
        """Whether each alternative that it asks for is one of the values that the label has."""
        return all(any(re.fullmatch(wanted, value) for value in values) for wanted in self.matchers[label].split("|"))


def selectors(expression: str) -> list[Selector]:
    """The project's series in an expression, recorded ones included."""
    found = _SERIES.finditer(expression)
    return [Selector(match["name"], dict(_MATCHER.findall(match["matchers"] or ""))) for match in found]


def grouping_labels(expression: str) -> set[str]:
    """Labels after `by`, `without`, `on` and `group_left`."""
    lists = re.findall(r"\b(?:by|without|on|group_left)\s*\(([^)]*)\)", expression)
    return {label.strip() for group in lists for label in group.split(",") if label.strip()}


def rules(file_name: str) -> list[dict[str, Any]]:
    """Rules of one of Prometheus' files."""
    return [rule for group in read_yaml(DEPLOY / "prometheus" / file_name)["groups"] for rule in group["rules"]]


def recorded_names() -> set[str]:
    """Names of all recording rules."""
    return {rule["record"] for rule in rules("rules.yml")}


def queries(dashboard: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each panel of a dashboard with each of its targets."""
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    return [(panel, target) for panel in panels for target in panel["targets"]]


def substituted(expression: str, variables: Mapping[str, str]) -> str:
    """An expression as Grafana sends it: with its variables replaced, and no other in it."""
    for name, value in variables.items():
        expression = expression.replace(f"${name}", value)
    assert "$" not in expression, expression
    return expression
