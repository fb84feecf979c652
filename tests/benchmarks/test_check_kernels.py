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
READ_BYTES_PER_S = 20e9


def _row(scheme: str, rows: int, *, packed_bytes: int) -> dict[str, Any]:
    """A row that reaches every number, but none by far."""
    return {
        "scheme": scheme,
        "rows": rows,
        "k": 64,
        "n": packed_bytes,
        "packed_bytes": packed_bytes,
        "seconds": packed_bytes / READ_BYTES_PER_S + 7.9e-6,
        "read_bytes_per_s": READ_BYTES_PER_S,
        "read_ratio": 0.851 if scheme == "w8a16" else 0.801,
        "linear_ratio": 1.029,
        "one_row_ratio": {1: 1.0, 4: 1.149}.get(rows, 1.399),
    }


def _good() -> dict[str, Any]:
    sizes, counts = (4 << 20, (4 << 20) - 1), (1, 4, 16, 512)
    return {
        "read_check": [{"scheme": "w8a16", "k": 64, "n": 64, "ratio": 0.96}],
        "rows": [_row(scheme, rows, packed_bytes=size) for size in sizes for rows in counts for scheme in SCHEMES],
        "encoders": [
            {"scheme": scheme, "read_ratio": 0.51, "seconds": 0.1, "num_parameters": 2**26} for scheme in SCHEMES
        ],
    }


def _misses(result: dict[str, Any]) -> list[str]:
    return [requirement.name for requirement in check(result) if requirement.misses]


def test_figures_that_reach_every_number_pass() -> None:
    assert [requirement.verdict for requirement in check(_good())] == ["pass"] * 11


def _change(rows: int, name: str, value: float, scheme: str = "w8a16") -> Callable[[dict[str, Any]], None]:
    """Set one field in the rows of the larger matrix."""

    def change(result: dict[str, Any]) -> None:
        for row in result["rows"]:
            if (row["rows"], row["scheme"], row["n"]) == (rows, scheme, 4 << 20):
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
        (lambda result: result["rows"][12].update(seconds=1.0), "1 row, < 4 MiB: read time + 8 us"),
        (lambda result: result["encoders"][1].update(read_ratio=0.499), "encoder w4a16-g64: 50%"),
        (lambda result: result["encoders"][2].update(seconds=2.0 * 2**26 / 1.1e9 + 1e-6), "encoder nf4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_figure_that_misses_one_number_fails_that_one(change: Callable[[dict[str, Any]], None], name: str) -> None:
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
    result["rows"] = [row for row in result["rows"] if row["rows"] != 512]
    path.write_text(json.dumps(result), encoding="utf-8")
    assert main() == 1
    assert "not measured  512 rows" in capsys.readouterr().out
