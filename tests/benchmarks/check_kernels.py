"""Holds figures of `pennyweight bench kernels --json` against what the kernels are to reach.

    python -m tests.benchmarks.check_kernels FILE.json

Prints every requirement with the worst figure that was measured for it, and what misses it; ends with 1 if any does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.reports.bench_options import (
    DEFAULT_ROWS,
    DEFAULT_SCHEMES,
    DEFAULT_SHAPES,
    parse_rows,
    parse_schemes,
    parse_shapes,
)

SCHEMES = [scheme.name for scheme in parse_schemes(DEFAULT_SCHEMES)]
SHAPES = parse_shapes(DEFAULT_SHAPES)
ROWS = parse_rows(DEFAULT_ROWS)
"""What has to be measured at least: every one of these points."""
MIN_READ_RATIO = {8: 0.85, 4: 0.80}
"""Share of the read rate at one row, by bits, from `LARGE_BYTES` on."""
LARGE_BYTES = 4 << 20
CALL_S = 8e-6
MAX_ONE_ROW_RATIO = {4: 1.15, 16: 1.4}
MAX_LINEAR_RATIO = 1.03
MANY_ROWS, MAX_SPREAD = 512, 1.10
MIN_READ_CHECK = 0.95
MIN_ENCODER_RATIO = {"w8a16": 0.5, "w4a16-g64": 0.5}
NF4_PARAMETERS, NF4_SECONDS = 1.1e9, 2.0

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """Something measured: `margin` is at least 1 where it meets its requirement."""

    subject: str
    text: str
    margin: float


@dataclass
class Requirement:
    """A number to reach and every figure that it is about."""

    name: str
    figures: list[Figure] = field(default_factory=list)

    @property
    def misses(self) -> list[Figure]:
        return [figure for figure in self.figures if figure.margin < 1]

    @property
    def verdict(self) -> str:
        return "not measured" if not self.figures else "FAIL" if self.misses else "pass"


def check(result: Mapping[str, Any]) -> list[Requirement]:
    """All requirements, each with its figures."""
    rows: list[Row] = result["rows"]
    first = [row for row in rows if row["rows"] == 1]
    large = [row for row in first if row["packed_bytes"] >= LARGE_BYTES]
    small = [row for row in first if row["packed_bytes"] < LARGE_BYTES]
    found = [
        Requirement("all points of the list are measured", list(_point_figures(rows))),
        Requirement(
            f"the read reaches {MIN_READ_CHECK} of torch.sum",
            [
                Figure(_subject(row), f"{row['ratio']:.2f}", row["ratio"] / MIN_READ_CHECK)
                for row in result["read_check"]
            ],
        ),
    ]
    for bits, least in MIN_READ_RATIO.items():
        of_bits = [row for row in large if _bits(row["scheme"]) == bits]
        found.append(
            Requirement(
                f"{bits} bit, 1 row, >= 4 MiB: {least:.0%} of the read rate",
                _figures(of_bits, lambda row: row["read_ratio"], "{:.0%}", least=least),
            )
        )
    found.append(Requirement("1 row, < 4 MiB: read time + 8 us", list(_small_figures(small))))
    for num_rows, most in MAX_ONE_ROW_RATIO.items():
        some = [row for row in rows if row["rows"] == num_rows]
        found.append(
            Requirement(
                f"{num_rows} rows: {most}x one row",
                _figures(some, lambda row: row["one_row_ratio"], "{:.2f}x", most=most),
            )
        )
    found.append(
        Requirement(
            f"any rows: {MAX_LINEAR_RATIO}x bf16 linear",
            _figures(rows, lambda row: row["linear_ratio"], "{:.2f}x", most=MAX_LINEAR_RATIO),
        )
    )
    found.append(Requirement(f"{MANY_ROWS} rows: formats within {MAX_SPREAD - 1:.0%}", list(_spread_figures(rows))))
    return [*found, *_encoder_requirements(result["encoders"])]


def _point_figures(rows: Iterable[Row]) -> Iterator[Figure]:
    points = {(row["scheme"], row["k"], row["n"], row["rows"]) for row in rows}
    for scheme in SCHEMES:
        for k, n in SHAPES:
            found = sum((scheme, k, n, num_rows) in points for num_rows in ROWS)
            yield Figure(f"{scheme} {k}x{n}", f"{found} of {len(ROWS)} row counts", found / len(ROWS))


def _figures(
    rows: Iterable[Row],
    value: Callable[[Row], float],
    form: str,
    *,
    least: float | None = None,
    most: float | None = None,
) -> list[Figure]:
    """A figure for each row, against a lower or an upper bound."""

    def margin(measured: float) -> float:
        return measured / least if least is not None else (most or 0) / measured

    return [Figure(_subject(row), form.format(value(row)), margin(value(row))) for row in rows]


def _small_figures(rows: Iterable[Row]) -> Iterator[Figure]:
    for row in rows:
        allowed_s = row["packed_bytes"] / row["read_bytes_per_s"] + CALL_S
        text = f"{row['seconds'] * 1e6:.1f} of {allowed_s * 1e6:.1f} us"
        yield Figure(_subject(row), text, allowed_s / row["seconds"])


def _spread_figures(rows: Iterable[Row]) -> Iterator[Figure]:
    found: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        if row["rows"] == MANY_ROWS:
            found.setdefault((row["k"], row["n"]), {})[row["scheme"]] = row["seconds"]
    for (k, n), seconds in found.items():
        spread = max(seconds.values()) / min(seconds.values())
        is_spread = len(seconds) > 1
        yield Figure(f"{k}x{n}", f"{spread:.2f}x" if is_spread else "one scheme", MAX_SPREAD / spread * is_spread)


def _encoder_requirements(encoders: Iterable[Row]) -> Iterator[Requirement]:
    by_scheme = {row["scheme"]: row for row in encoders}
    for scheme, least in MIN_ENCODER_RATIO.items():
        ratios = [by_scheme[scheme]["read_ratio"]] if scheme in by_scheme else []
        figures = [Figure(scheme, f"{ratio:.0%}", ratio / least) for ratio in ratios]
        yield Requirement(f"encoder {scheme}: {least:.0%} of the read rate of bf16", figures)
    rows = [by_scheme["nf4"]] if "nf4" in by_scheme else []
    times = [row["seconds"] * NF4_PARAMETERS / row["num_parameters"] for row in rows]
    figures = [Figure("nf4", f"{seconds:.2f} s", NF4_SECONDS / seconds) for seconds in times]
    yield Requirement(f"encoder nf4: 1.1 B parameters in {NF4_SECONDS:g} s", figures)


def _bits(scheme: str) -> int:
    return 8 if scheme.startswith("w8") else 4


def _subject(row: Row) -> str:
    rows = f", {row['rows']} rows" if "rows" in row else ""
    return f"{row['scheme']} {row['k']}x{row['n']}{rows}"


def _lines(requirement: Requirement) -> Iterator[str]:
    figures = sorted(requirement.figures, key=lambda figure: figure.margin)
    worst = f"worst {figures[0].text} ({figures[0].subject}), {len(figures)} measured" if figures else ""
    yield f"{requirement.verdict:12}  {requirement.name:50}  {worst}".rstrip()
    for figure in figures:
        if figure.margin < 1:
            yield f"{'':12}    missed: {figure.subject:40} {figure.text}"


def conclude(requirements: Iterable[Requirement]) -> int:
    """Print requirements; 1 if one is missed or was not measured."""
    requirements = list(requirements)
    for requirement in requirements:
        print("\n".join(_lines(requirement)))
    return int(any(requirement.verdict != "pass" for requirement in requirements))


def main() -> int:
    """Print all requirements; 1 if one is missed or was not measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of `pennyweight bench kernels`")
    return conclude(check(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    raise SystemExit(main())
