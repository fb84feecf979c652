"""What the README claims about commands, settings, recipes, series and files is so."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from typing import Any

import pytest

from service.invocation import flag_of
from service.numerics.recipe import parse_recipe
from service.settings import Settings
from tests.floors import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = ["pip install -e . && pennyweight serve", "pip install -e '.[test]' && pytest"]


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"the README has no section {title!r}"
    return found[1]


def settings_table() -> str:
    """The table that the README must have: flag, default, allowed values, meaning."""
    rows = ["| flag | default | allowed | meaning |", "|---|---|---|---|"]
    for name, schema in Settings.model_json_schema()["properties"].items():
        default = schema["default"]
        default = "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        allowed = "; ".join(_allowed(part) for part in schema.get("anyOf", [schema]) if part.get("type") != "null")
        rows.append(f"| `{flag_of(name)}` | {default} | {allowed} | {schema['description']} |")
    return "\n".join(rows) + "\n"


def _allowed(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " ".join(f"`{value}`" for value in schema["enum"])
    low, high = (schema.get(key, schema.get(short)) for key, short in (("minimum", "ge"), ("maximum", "le")))
    if low is not None:
        return f"{low} to {high}" if schema["type"] == "integer" else f"{low} to {high}, fractions too"
    if schema["type"] == "boolean":
        return "`true` `false`"
    if "maxLength" in schema:
        return f"{schema['minLength']} to {schema['maxLength']} characters"
    return "a path"


def named_paths() -> set[str]:
    """Paths in the file map, without the slash behind a folder."""
    return {path.rstrip("/") for path in re.findall(r"^\| `([^`]+)` \|", section("File map"), re.MULTILINE)}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_two_commands_stand_in_the_readme(command: str) -> None:
    assert f"    {command}" in README


def test_the_ci_runs_the_test_command_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    install, test = COMMANDS[1].split(" && ")
    assert install.replace("pip install", "pip install --quiet") in lines
    assert test in lines


def test_the_settings_table_is_that_of_the_settings() -> None:
    table = settings_table()
    assert table in section("Settings"), f"the table must be\n{table}"


@pytest.mark.parametrize("recipe", re.findall(r"^\| `([^`]+)` \|", section("Recipes"), re.MULTILINE))
def test_a_recipe_of_the_readme_is_one(recipe: str) -> None:
    assert parse_recipe(recipe).text == recipe


def test_a_series_of_the_readme_is_exported() -> None:
    source = (ROOT / "service" / "metrics.py").read_text(encoding="utf-8")
    exported = set(re.findall(r'"(?:\{PREFIX\}_)?([a-z0-9_]+)"', source))
    named = re.findall(r"`pennyweight_([a-z0-9_]+)", section("Metrics"))
    assert named
    assert {name.removesuffix("_total") for name in named} <= exported


def test_every_series_that_is_exported_stands_in_the_readme() -> None:
    source = (ROOT / "service" / "metrics.py").read_text(encoding="utf-8")
    named = {name.removesuffix("_total") for name in re.findall(r"`pennyweight_([a-z0-9_]+)`", section("Metrics"))}
    made = r"(?:_counter|_gauges?|_histogram|Gauge)\(\s*f?\"(?:\{PREFIX\}_)?([a-z0-9_]+)\""
    exported = set(re.findall(made, source))
    assert {"model_info", "last_step_timestamp_seconds", "batch_tokens"} <= exported
    assert exported - named == set()


def test_the_tiers_of_the_readme_are_the_markers() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    markers = [line.partition(":")[0] for line in configured["markers"]]
    tiers = re.findall(r"^\| `pytest(?: -m '?(\w+)[^`]*)?` \|", section("Development"), re.MULTILINE)
    assert sorted(tiers) == sorted(["", *markers])
    words = {6: "six", 7: "seven", 8: "eight"}
    assert f"Tests have {words[len(tiers)]} tiers" in section("Development")
    assert all(f"not {marker}" in configured["addopts"] for marker in markers), "`pytest` alone runs none of them"


def test_the_file_map_names_only_what_exists() -> None:
    assert {path for path in named_paths() if not (ROOT / path).exists()} == set()


def test_the_file_map_names_every_room_of_the_service() -> None:
    rooms = {f"service/{path.name}" for path in (ROOT / "service").iterdir() if path.name[0] != "_"}
    assert rooms <= named_paths()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a git checkout knows which files are the project's")
def test_the_file_map_names_every_top_level_entry() -> None:
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {path.partition("/")[0] for path in listed} - {"service"} <= named_paths()


def test_the_readme_states_the_stored_figures() -> None:
    results = ROOT / "tests" / "benchmarks" / "results"
    ratios = json.loads((results / "engine_2026-11-21.json").read_text(encoding="utf-8"))["ratios"]
    one = [f"{ratios[f'{scheme}: step time at 1 / stock']:.2f}" for scheme in ("none", "w8a16")]
    many = [f"{ratios[f'{scheme}: tokens/s at 16 / stock']:.1f}" for scheme in ("none", "w8a16")]
    assert f"| {', '.join(one)} |" in README
    assert f"| {', '.join(many)} |" in README
    start = json.loads((results / "start_2026-11-21.json").read_text(encoding="utf-8"))
    loads = [load for load in start["loads"] if load["recipe"] == "w8a16"]
    slowest = max(load["load_s"] for load in loads)
    largest = max(load["peak_over_start_and_weights_mb"] for load in loads)
    ready = max(figures["ready_s"] for figures in start["demo"])
    live = max(figures["livez_s"] for figures in start["demo"])
    assert f"| {live:.1f} s, {ready:.1f} s |" in README
    assert f"| {slowest:.1f} s |" in README
    assert f"| {largest:.0f} MB |" in README
    model = json.loads((results / "model_2026-11-21.json").read_text(encoding="utf-8"))
    for shape in model["shapes"]:
        for row in shape["rows"][1:]:
            speed = row["speedup"]
            assert f"| {speed['decode_1']:.1f}, {speed['decode_16']:.1f}, {speed['prefill_512']:.2f} |" in README
    kernels = json.loads((results / "kernels_2026-11-21.json").read_text(encoding="utf-8"))
    assert f"| {max(row['linear_ratio'] for row in kernels['rows']):.2f} |" in README


def test_the_caption_of_the_saving_says_what_was_measured() -> None:
    """And the picture is the one that was drawn of these figures."""
    figures = json.loads((ROOT / "tests" / "benchmarks" / "results" / "serve_2026-11-21.json").read_text("utf-8"))
    picture = (ROOT / "docs" / "images" / "saving.png").read_bytes()
    assert figures["date"].encode() in picture
    caption = README.partition("saving.png)")[2].partition("\n## ")[0]
    one, many = (row["output_tokens_per_s_ratio"] for row in figures["comparisons"])
    for words in (
        f"{figures['models'][1]['saving_ratio']:.0%}".replace("%", " % less weights"),
        f"{one:.2f} times the tokens per second for one client and {many:.2f} times for eight",
        f"{100 * figures['quality']['top1_ratio']:.1f} % of the time",
    ):
        assert words in caption.replace("\n", " ")
    assert all(row["errors"] == 0 for row in figures["servers"])
