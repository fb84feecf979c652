"""The checker of kernel figures finds what misses a number, and nothing else."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.check_kernels import check, main

SCHEMES = ("w8a16", "w4a16-g64", "nf4")
SHAPES = (
    *((576, 576), (576, 1536), (1536, 576), (2048, 2048)),
    *((2048, 5632), (5632, 2048), (2048, 32000), (4096, 14336)),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
SMALL, LARGE = SHAPES[0], SHAPES[-1]
READ_BYTES_PER_S = 20e9

Change = Callable[[dict[str, Any]], None]


def _row(scheme: str, rows: int, shape: tuple[int, int]) -> dict[str, Any]:
    """A row that reaches every number, but none by far."""
    k, n = shape
    packed_bytes = k * n  # of all schemes, so that they take the same time
    return {
        "scheme": scheme,
        "rows": rows,
        "k": k,
        "n": n,
        "packed_bytes": packed_bytes,
        "seconds": packed_bytes / READ_BYTES_PER_S + 7.9e-6,
        "read_bytes_per_s": READ_BYTES_PER_S,
        "read_ratio": 0.851 if scheme == "w8a16" else 0.801,
        "linear_ratio": 1.029,
        "one_row_ratio": {1: 1.0, 4: 1.149}.get(rows, 1.399),
    }


def _good() -> dict[str, Any]:
    return {
        "read_check": [{"scheme": "w8a16", "k": 64, "n": 64, "ratio": 0.96}],
        "rows": [_row(scheme, rows, shape) for shape in SHAPES for rows in ROWS for scheme in SCHEMES],
        "encoders": [
            {"scheme": scheme, "read_ratio": 0.51, "seconds": 0.1, "num_parameters": 2**26} for scheme in SCHEMES
        ],
    }


def _misses(result: dict[str, Any]) -> list[str]:
    return [requirement.name for requirement in check(result) if requirement.misses]


def test_figures_that_reach_every_number_pass() -> None:
    assert [requirement.verdict for requirement in check(_good())] == ["pass"] * 12


def _change(rows: int, name: str, value: float, scheme: str = "w8a16", shape: tuple[int, int] = LARGE) -> Change:
    """Set one field in the rows of one matrix."""

    def change(result: dict[str, Any]) -> None:
        for row in result["rows"]:
            if (row["rows"], row["scheme"], row["k"], row["n"]) == (rows, scheme, *shape):
                row[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_change(1, "read_ratio", 0.849), "8 bit, 1 row, >= 4 MiB"),
        (_change(1, "read_ratio", 0.799, "nf4"), "4 bit, 1 row, >= 4 MiB"),
        (_change(4, "one_row_ratio", 1.151), "4 rows: 1.15x one row"),
        (_change(16, "one_row_ratio", 1.401), "16 rows: 1.4x one row"),
        (_change(16, "linear_ratio", 1.031), "any rows: 1.03x bf16 linear"),
        (_change(512, "seconds", 1.0), "512 rows: formats within 10%"),
        (lambda result: result["read_check"][0].update(ratio=0.949), "the read reaches 0.95"),
        (_change(1, "seconds", 1.0, shape=SMALL), "1 row, < 4 MiB: read time + 8 us"),
        (lambda result: result["encoders"][1].update(read_ratio=0.499), "encoder w4a16-g64: 50%"),
        (lambda result: result["encoders"][2].update(seconds=2.0 * 2**26 / 1.1e9 + 1e-6), "encoder nf4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_figure_that_misses_one_number_fails_that_one(change: Change, name: str) -> None:
    result = copy.deepcopy(_good())
    change(result)
    (missed,) = _misses(result)
    assert missed.startswith(name)


def test_the_share_of_the_read_rate_is_asked_of_one_row_only() -> None:
    result = _good()
    _change(4, "read_ratio", 0.01)(result)
    assert _misses(result) == []


def test_what_was_not_measured_does_not_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["check_kernels", str(path)])
    result = _good()
    path.write_text(json.dumps(result), encoding="utf-8")
    assert main() == 0
    assert "pass" in capsys.readouterr().out
    result["encoders"] = []
    path.write_text(json.dumps(result), encoding="utf-8")
    assert main() == 1
    printed = capsys.readouterr().out
    for scheme in SCHEMES:
        assert f"not measured  encoder {scheme}" in printed


@pytest.mark.parametrize(
    ("is_left_out", "names"),
    [
        (lambda row: row["rows"] == 512, ["all points", "512 rows"]),
        (lambda row: (row["k"], row["n"]) == SMALL and row["rows"] == 2048, ["all points"]),
        (lambda row: row["scheme"] == "nf4", ["all points"]),
        (lambda row: (row["k"], row["n"]) == LARGE, ["all points"]),
        (lambda row: row["rows"] == 512 and row["scheme"] != "nf4", ["all points", "512 rows"]),
    ],
    ids=["a number of rows", "a number of rows of a shape", "a scheme", "a shape", "all schemes but one"],
)
def test_a_grid_with_a_gap_does_not_pass(is_left_out: Callable[[dict[str, Any]], bool], names: list[str]) -> None:
    result = _good()
    result["rows"] = [row for row in result["rows"] if not is_left_out(row)]
    failed = [requirement.name for requirement in check(result) if requirement.verdict != "pass"]
    assert len(failed) == len(names)
    assert all(name.startswith(start) for name, start in zip(failed, names, strict=True))
