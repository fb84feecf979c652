"""The checker of whole-model figures finds what misses a number, and what was not measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import bench_engine, bench_model
from tests.benchmarks.check_model import RECIPES, SHAPES, check, main

W8_DECODE, W4_DECODE = "w8a16, decode of 1 sequence: 1.7x", "w4a16-g64, decode of 1 sequence: 2.2x"
PREFILL, DECODE_16 = "prefill of 512 tokens: never slower", "decode of 16 sequences: never slower"


def _good() -> dict[str, Any]:
    """Figures that reach every number exactly."""

    def row(shape: str, recipe: str) -> dict[str, Any]:
        decode = {"none": 1.0, "w8a16": 1.7, "w4a16-g64": 2.2 if shape == SHAPES[1] else 0.5}[recipe]
        return {"recipe": recipe, "speedup": {"decode_1": decode, "decode_16": 1.0, "prefill_512": 1.0}}

    return {"shapes": [{"shape": shape, "rows": [row(shape, name) for name in ("none", *RECIPES)]} for shape in SHAPES]}


def _verdicts(result: dict[str, Any]) -> dict[str, str]:
    return {requirement.name: requirement.verdict for requirement in check(result)}


def test_figures_that_reach_every_number_pass() -> None:
    assert _verdicts(_good()) == dict.fromkeys((W8_DECODE, W4_DECODE, PREFILL, DECODE_16), "pass")


@pytest.mark.parametrize("shape", [0, 1], ids=SHAPES)
@pytest.mark.parametrize(
    ("recipe", "key", "value", "name"),
    [
        (1, "decode_1", 1.699, W8_DECODE),
        (2, "decode_1", 2.199, W4_DECODE),
        (1, "prefill_512", 0.999, PREFILL),
        (2, "prefill_512", 0.999, PREFILL),
        (1, "decode_16", 0.999, DECODE_16),
        (2, "decode_16", 0.999, DECODE_16),
    ],
)
def test_a_figure_that_misses_one_number_fails_that_one(
    shape: int, recipe: int, key: str, value: float, name: str
) -> None:
    result = _good()
    result["shapes"][shape]["rows"][recipe]["speedup"][key] = value
    is_asked = (shape, name) != (0, W4_DECODE)  # of the larger shape only
    assert [name for name, verdict in _verdicts(result).items() if verdict != "pass"] == [name] * is_asked


def test_what_was_not_measured_does_not_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["check_model", str(path)])
    result = _good()
    path.write_text(json.dumps(result), encoding="utf-8")
    assert main() == 0
    del result["shapes"][0]["rows"][1]
    path.write_text(json.dumps(result), encoding="utf-8")
    capsys.readouterr()
    assert main() == 1
    assert "missed: w8a16 smollm2-135m" in capsys.readouterr().out


def test_the_benchmark_measures_what_is_checked() -> None:
    assert set(SHAPES) <= set(bench_model.SHAPES)
    assert {"none", *RECIPES} <= set(bench_model.RECIPES)
    assert (bench_model.NUM_PREFILL_TOKENS, bench_engine.NUM_SEQUENCES) == (512, (1, 16))
