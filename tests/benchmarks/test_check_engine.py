"""The checker of the engine's figures finds what misses a number, and what was not measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import bench_processes, bench_scheduling
from tests.benchmarks.check_engine import MAX_BOOKKEEPING_MS, MAX_PROCESS_RATIO, RECIPE, check, main

Change = Callable[[dict[str, Any]], None]


def _good() -> dict[str, dict[str, Any]]:
    """Figures that reach every number exactly, by the benchmark that writes them."""
    steps = [
        {"path": "engine", "scheme": RECIPE, "num_sequences": count, "tokens_per_s": speed}
        for count, speed in ((1, 10.0), (16, 50.0))
    ]
    models: dict[str, Any] = {"demo": {"ratios": {"bytes per token": 0.53, "blocks": 1.85, "step time": 9.0}}}
    return {
        "engine": {"rows": [{"path": "stock", "scheme": "none", "num_sequences": 1, "tokens_per_s": 1.0}, *steps]},
        "scheduling": {
            "bookkeeping": [{"sequences": 16, "median_ms": 0.3}, {"sequences": 128, "median_ms": 1.0}],
            "fairness": {
                "prompt_tokens": 2048,
                "step_budget_ms": 50,
                "quiet_median_ms": 20.0,
                "inter_token_ms": {"p50": 70.0, "p99": 80.0},
                "first_token_ratio": 2.0,
            },
            "prefix": {"prefix_tokens": 1000, "speedup": 5.0},
        },
        "sampler": {
            "rows": [
                {"case": "greedy", "path": "sampler", "median_ms": 4.0},
                {"case": "all", "path": "transformers", "median_ms": 400.0},
            ]
        },
        "kv_cache": {"kl_nats": {"torch.float32": {"mean": 0.002, "p99": 1.0}}, "models": models},
        "processes": {"models": [{"model": "demo", "speed_ratio": 1.05}]},
    }


def _verdicts(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {requirement.name: requirement.verdict for requirement in check(results.values())}


def test_figures_that_reach_every_number_pass() -> None:
    verdicts = _verdicts(_good())
    assert len(verdicts) == 11
    assert set(verdicts.values()) == {"pass"}


def _set(benchmark: str, *path: str | int, value: float) -> Change:
    def change(results: dict[str, Any]) -> None:
        place = results[benchmark]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_set("scheduling", "bookkeeping", 0, "median_ms", value=0.301), "outside the forward, 16"),
        (_set("scheduling", "bookkeeping", 1, "median_ms", value=1.001), "outside the forward, 128"),
        (_set("engine", "rows", 2, "tokens_per_s", value=49.9), "w8a16, 16 sequences"),
        (_set("scheduling", "fairness", "inter_token_ms", "p99", value=80.1), "inter-token p99"),
        (_set("scheduling", "fairness", "first_token_ratio", value=2.01), "first token of that prompt"),
        (_set("scheduling", "prefix", "speedup", value=4.99), "a repeated prefix"),
        (_set("sampler", "rows", 0, "median_ms", value=4.01), "sampler"),
        (_set("kv_cache", "models", "demo", "ratios", "bytes per token", value=0.531), "int8 KV: 0.53"),
        (_set("kv_cache", "models", "demo", "ratios", "blocks", value=1.84), "int8 KV: 1.85x"),
        (_set("kv_cache", "kl_nats", "torch.float32", "mean", value=0.0021), "int8 KV: mean KL"),
        (_set("processes", "models", 0, "speed_ratio", value=1.06), "two processes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_figure_that_misses_one_number_fails_that_one(change: Change, name: str) -> None:
    results = _good()
    change(results)
    (failed,) = [found for found, verdict in _verdicts(results).items() if verdict != "pass"]
    assert failed.startswith(name)


@pytest.mark.parametrize("benchmark", list(_good()))
def test_what_was_not_measured_does_not_pass(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = _good()
    paths = {name: tmp_path / f"{name}.json" for name in results}
    for name, path in paths.items():
        path.write_text(json.dumps(results[name]), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["check_engine", *map(str, paths.values())])
    assert main() == 0
    del paths[benchmark]
    monkeypatch.setattr(sys, "argv", ["check_engine", *map(str, paths.values())])
    capsys.readouterr()
    assert main() == 1
    assert "not measured" in capsys.readouterr().out


def test_the_benchmarks_measure_what_is_checked() -> None:
    assert set(MAX_BOOKKEEPING_MS) == set(bench_scheduling.NUM_BOOKKEPT)
    assert (bench_scheduling.NUM_STREAMS, bench_scheduling.LONG_PROMPT, bench_scheduling.PREFIX) == (8, 2048, 1000)
    assert (bench_processes.NUM_STREAMS, bench_processes.MAX_RATIO) == (64, MAX_PROCESS_RATIO)
