"""A memory limit between the planned peaks of both twins: the unquantized one is refused, the quantized one serves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.make_model import main as make_model
from tests.e2e.support import ROOT, clean_environment, ready, started

pytestmark = pytest.mark.e2e

OPTIONS = ["--device", "cpu", "--dtype", "bfloat16", "--threads", "1"]
TWINS = ["none", "w8a16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the shape of SmolLM2-135M: 269 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("squeeze") / "smollm-135m"
    assert make_model(["--shape", "smollm-135m", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def plans(model: Path) -> list[dict[str, Any]]:
    """What the command says of both twins, each in a process of its own."""
    commands = [
        [sys.executable, "-m", "service", "plan", str(model), "--quantize", recipe, "--json", *OPTIONS]
        for recipe in TWINS
    ]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    return [json.loads(process.communicate()[0]) for process in processes]


@pytest.fixture(scope="module")
def limit(plans: list[dict[str, Any]]) -> int:
    baseline, quantized = plans
    return int(baseline["peak_bytes"] + quantized["peak_bytes"]) // 2


def test_both_twins_fit_without_a_limit_and_differ_by_what_quantization_saves(plans: list[dict[str, Any]]) -> None:
    baseline, quantized = plans
    assert [plan["fits"] for plan in plans] == [True, True]
    assert baseline["quantized_bytes"] == baseline["original_bytes"] == quantized["original_bytes"]
    saved = baseline["quantized_bytes"] - quantized["quantized_bytes"]
    measured_base = baseline["peak"]["base_bytes"] - quantized["peak"]["base_bytes"]
    assert baseline["peak_bytes"] - quantized["peak_bytes"] == saved + measured_base
    assert saved > 100 * 10**6


def test_the_unquantized_twin_is_refused_with_3_and_the_sentence_of_the_plan(
    model: Path, limit: int, plans: list[dict[str, Any]]
) -> None:
    """With the figure of the plan, too: both count a process that has imported the same and loaded the kernels."""
    arguments = [str(model), "--quantize", "none", "--memory", str(limit), *OPTIONS]
    with started(*arguments, "--log-format", "json") as server:
        assert server.exit_code() == 3
    entries = [json.loads(line) for line in server.log]
    refusal = entries[-1]["message"]
    assert entries[-1]["level"] == "ERROR"
    found = re.search(
        rf"smollm-135m as none needs (\d+) bytes, --memory allows {limit}; --quantize w8a16 fits with \d+$", refusal
    )
    assert found
    assert abs(int(found[1]) - plans[0]["peak_bytes"]) < 8 * 10**6  # the application and what it answered already
    assert not any("now load" in entry["message"] for entry in entries), "it read weights"


def test_the_quantized_twin_serves_within_the_same_limit(model: Path, limit: int) -> None:
    with ready(str(model), "--quantize", "w8a16", "--memory", str(limit), *OPTIONS) as (server, client):
        body = {"model": "smollm-135m", "prompt": "The captain", "max_tokens": 4, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] >= 1
        assert server.peak_bytes() <= limit
