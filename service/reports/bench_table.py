"""The figures of `pennyweight bench kernels` for people: a table for each shape."""

from __future__ import annotations

import sys
from itertools import groupby

from rich.console import Console
from rich.table import Table

from service.reports.bench_kernels import KernelReport, KernelRow
from service.reports.terminal import FILE_WIDTH, duration

_GB = 1e9
_MIB = 2**20


def print_report(report: KernelReport, console: Console | None = None) -> None:
    """Everything that was measured, in figures that compare."""
    console = console or Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    machine, footprint = report.machine, report.footprint["bytes"]
    console.print(
        f"{machine['cpu'] or machine['architecture']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"kernels: {', '.join(dict.fromkeys(row.kernel for row in report.rows))}; "
        f"copies of {footprint / _MIB:.0f} MiB, caches of {report.footprint['last_level_cache_bytes'] / _MIB:.0f} MiB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for (k, n), rows in groupby(report.rows, key=lambda row: (row.k, row.n)):
        console.print(_shape_table(f"{k} x {n}", list(rows)))
    if report.encoders:
        console.print(_encoder_table(report))
    slowest = min(check.ratio for check in report.read_check)
    console.print(
        f"read: share of the rate at which the same bytes are read ({report.read_kernel}, at least {slowest:.2f} of "
        "what torch.sum reads); bf16: how many times as fast as bf16 linear",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _shape_table(title: str, rows: list[KernelRow]) -> Table:
    """A line for each number of rows; time, share of the read rate and speed-up of each scheme."""
    table = Table(title=title, title_justify="left")
    schemes = dict.fromkeys(row.scheme for row in rows)
    for name in ("rows", "bf16 linear", *(name for scheme in schemes for name in (scheme, "read", "bf16"))):
        table.add_column(name, justify="right", no_wrap=True)
    for num_rows, same_rows in ((count, list(group)) for count, group in groupby(rows, key=lambda row: row.rows)):
        cells = [str(num_rows), duration(same_rows[0].bf16_linear_seconds)]
        for row in same_rows:
            cells += [duration(row.seconds), f"{row.read_ratio:.0%}", f"{1 / row.linear_ratio:.2f}x"]
        table.add_row(*cells)
    return table


def _encoder_table(report: KernelReport) -> Table:
    table = Table(title="encoders", title_justify="left")
    for name in ("scheme", "parameters", "time", "bf16 GB/s", "read"):
        table.add_column(name, justify="left" if name == "scheme" else "right")
    for row in report.encoders:
        rate = f"{row.bytes_per_s / _GB:.2f}"
        table.add_row(row.scheme, str(row.num_parameters), duration(row.seconds), rate, f"{row.read_ratio:.0%}")
    return table
