"""The figures of `pennyweight bench serve` for people: what each server holds, its load, and what one saves."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from service.reports.bench_quality import Quality
from service.reports.bench_serve import Comparison, ModelRow, ServeReport
from service.reports.bench_serve_options import Load
from service.reports.percentiles import Percentiles
from service.reports.terminal import FILE_WIDTH

_MB = 1e6
_UNKNOWN = "-"


def print_report(report: ServeReport, console: Console | None = None) -> None:
    """Everything that was measured."""
    console = console or Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(_model_table(report.models))
    console.print(_load_table(report))
    if report.comparisons:
        console.print(_comparison_table(report.comparisons))
    for line in notes(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def notes(report: ServeReport) -> list[str]:
    """What tables cannot say."""
    lines = [f"memory is not known: {row.memory_note}" for row in report.models if row.memory_note]
    lines += [
        f"{row.url}: its prefix cache had {row.prefix_cache_hit_tokens} prompt tokens, which were not computed; "
        "measure while nobody else uses it"
        for row in report.models
        if row.prefix_cache_hit_tokens
    ]
    for row in report.servers:
        if row.errors:
            kinds = ", ".join(f"{count} {kind}" for kind, count in row.errors_by_kind.items())
            load = Load(row.clients, row.rate_per_s)
            lines.append(f"{row.url}, {load}: {row.errors} of {row.requests} requests not answered in full: {kinds}")
    if report.quality_note is not None:
        lines.append(f"quality is not known: {report.quality_note}")
    return lines + ([] if report.quality is None else quality_lines(report.quality))


def quality_lines(quality: Quality) -> list[str]:
    """How far apart the servers are on the text, and what that figure is."""
    return [
        f"quality of {quality.other} against {quality.reference} on {quality.num_tokens} tokens of the text: "
        f"KL at least {quality.kl_mean_nats:.2g} nats on average (99 % of tokens below {quality.kl_p99_nats:.2g}), "
        f"same likeliest token {quality.top1_ratio:.1%}, "
        f"perplexity {quality.other_perplexity:.2f} against {quality.reference_perplexity:.2f}",
        f"KL: over the likeliest 20 tokens of both, all others as one, so that the whole is not less; "
        f"{quality.compared_ratio:.1%} of the probability was compared token by token",
    ]


def _model_table(models: list[ModelRow]) -> Table:
    table = Table(title="held", title_justify="left")
    for name in ("server", "model", "scheme", "weights MB", "unquantized MB", "saved", "bits", "KV MB", "process MB"):
        table.add_column(name, justify="left" if name in ("server", "model", "scheme") else "right", overflow="fold")
    for row in models:
        memory = row.memory_bytes or {}
        table.add_row(
            row.url,
            row.model,
            row.scheme,
            f"{row.weight_bytes['total'] / _MB:.2f}",
            f"{row.original_bytes / _MB:.2f}",
            f"{row.saving_ratio:.1%}",
            f"{row.bits_per_parameter:.2f}",
            *(f"{memory[kind] / _MB:.0f}" if kind in memory else _UNKNOWN for kind in ("kv_cache", "rss")),
        )
    return table


def _load_table(report: ServeReport) -> Table:
    table = Table(title="served: p50 / p90 / p99", title_justify="left")
    columns = ("load", "scheme", "tokens/s", "requests/s", "first token", "token to token", "request", "errors")
    for name in columns:
        table.add_column(name, justify="left" if name in ("load", "scheme") else "right", overflow="fold")
    last = None
    for row in report.servers:
        load = Load(row.clients, row.rate_per_s)
        table.add_row(
            str(load) if load != last else "",
            row.scheme,
            f"{row.output_tokens_per_s:.1f}",
            f"{row.requests_per_s:.2f}",
            _latency(row.time_to_first_token_s),
            _latency(row.inter_token_s),
            _latency(row.request_s),
            f"{row.errors} of {row.requests}",
        )
        last = load
    return table


def _comparison_table(comparisons: list[Comparison]) -> Table:
    table = Table(title="second server by the first", title_justify="left")
    for name in ("load", "tokens/s", "of rounds", "first token", "token to token"):
        table.add_column(name, justify="left" if name == "load" else "right")
    for row in comparisons:
        least, largest = row.least_ratio, row.largest_ratio
        table.add_row(
            str(Load(row.clients, row.rate_per_s)),
            _ratio(row.output_tokens_per_s_ratio),
            _UNKNOWN if least is None or largest is None else f"{least:.2f} to {largest:.2f}",
            _ratio(row.time_to_first_token_ratio),
            _ratio(row.inter_token_ratio),
        )
    return table


def _latency(latency: Percentiles | None) -> str:
    """All three in one unit."""
    if latency is None:
        return _UNKNOWN
    factor, unit = (1.0, "s") if latency.p99 >= 1 else (1e3, "ms")
    figures = " / ".join(f"{factor * seconds:.3g}" for seconds in (latency.p50, latency.p90, latency.p99))
    return f"{figures} {unit}"


def _ratio(ratio: float | None) -> str:
    return _UNKNOWN if ratio is None else f"{ratio:.2f}x"
