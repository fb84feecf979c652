"""The figures of `pennyweight bench serve` as a picture: memory, throughput and latency side by side."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from service.reports.bench_serve import ServeReport, ServerRow
from service.reports.bench_serve_options import Load
from service.reports.bench_serve_table import quality_lines
from service.reports.percentiles import Percentiles

_COLOURS = ("#8c8c8c", "#1f6fb4")
_KINDS = {"codes": "#1f6fb4", "scales": "#f2a33a", "unquantized": "#8c8c8c"}
_MB = 1e6
_MS = 1e3
_GROUP_WIDTH = 0.8
_MAX_NAME_CHARACTERS = 60
_INCHES = (12.0, 3.9)
_DPI = 100


def draw(report: ServeReport, path: Path) -> None:
    """Write a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    weights, throughput, first, between = figure.subplots(1, 4)
    _draw_weights(weights, report)
    _draw_throughput(throughput, report)
    _draw_latency(first, report, "time_to_first_token_s", "ms to the first token")
    _draw_latency(between, report, "inter_token_s", "ms from token to token")
    patches = [Patch(color=colour) for colour in _COLOURS]
    figure.legend(patches[: len(report.models)], _names(report), fontsize=9, loc="outside lower center", ncols=2)
    title = f"{report.models[0].model[:_MAX_NAME_CHARACTERS]}: {' beside '.join(_names(report))}"
    if report.quality is not None:
        quality = report.quality
        title += (
            f"; KL at least {quality.kl_mean_nats:.2g} nats, same likeliest token {quality.top1_ratio:.1%}, "
            f"perplexity {quality.reference_perplexity:.2f} to {quality.other_perplexity:.2f}"
        )
    figure.suptitle(title, fontsize=11, parse_math=False)
    told = "\n".join([] if report.quality is None else quality_lines(report.quality))
    metadata = {"Title": title, "Creation Time": report.date, "Description": told}
    figure.savefig(path, format="png", metadata=metadata)


def _names(report: ServeReport) -> list[str]:
    """Schemes; where both are the same, with the server."""
    schemes = [row.scheme for row in report.models]
    is_clear = len(set(schemes)) == len(schemes)
    return schemes if is_clear else [f"{row.scheme} {row.url.rpartition('/')[2]}" for row in report.models]


def _by_server(report: ServeReport) -> list[list[ServerRow]]:
    """Rows of each server, in the order of the loads."""
    return [[row for row in report.servers if row.url == model.url] for model in report.models]


def _draw_weights(axes: Axes, report: ServeReport) -> None:
    """Bytes by kind, stacked, in front of what no quantization would hold."""
    names = _names(report)
    axes.bar(
        names, [row.original_bytes / _MB for row in report.models], color="none", edgecolor="#555555", linestyle="--"
    )
    below = [0.0] * len(names)
    for kind, colour in _KINDS.items():
        sizes = [row.weight_bytes.get(kind, 0) / _MB for row in report.models]
        axes.bar(names, sizes, bottom=below, color=colour, label=kind, width=0.6)
        below = [low + size for low, size in zip(below, sizes, strict=True)]
    for index, row in enumerate(report.models):
        text = f"{row.weight_bytes['total'] / _MB:.1f} MB" + (f"\n{-row.saving_ratio:+.0%}" if row.saving_ratio else "")
        axes.annotate(text, (index, below[index]), ha="center", va="bottom", fontsize=9)
    axes.set_ylim(top=1.35 * max(row.original_bytes for row in report.models) / _MB)
    axes.set_title("MB of weights (dashed: unquantized)", fontsize=9)
    axes.legend(fontsize=8, loc="upper right", ncols=3, columnspacing=0.8, handlelength=1.0)


def _draw_throughput(axes: Axes, report: ServeReport) -> None:
    for (server, group), place, width in _places(axes, report):
        row = _by_server(report)[server][group]
        bars = axes.bar([place], [row.output_tokens_per_s], width=width, color=_COLOURS[server])
        axes.bar_label(bars, fmt=_three_digits, fontsize=8)
    axes.set_title("tokens per second", fontsize=9)


def _draw_latency(axes: Axes, report: ServeReport, field: str, title: str) -> None:
    """Medians, and the 90th percentile behind them in a lighter colour; nothing where nothing was measured."""
    for (server, group), place, width in _places(axes, report):
        latency: Percentiles | None = getattr(_by_server(report)[server][group], field)
        if latency is None:
            continue
        axes.bar([place], [latency.p90 * _MS], width=width, color=_COLOURS[server], alpha=0.3)
        bars = axes.bar([place], [latency.p50 * _MS], width=width, color=_COLOURS[server])
        axes.bar_label(bars, fmt=_three_digits, fontsize=8, label_type="center", color="white")
    axes.set_title(f"{title}: p50, lighter p90", fontsize=9)


def _places(axes: Axes, report: ServeReport) -> Iterator[tuple[tuple[int, int], float, float]]:
    """Server and load by number, and middle and width of their bar; loads are groups, which get their names here."""
    loads = [str(Load(row.clients, row.rate_per_s)) for row in _by_server(report)[0]]
    num_servers = len(report.models)
    width = _GROUP_WIDTH / num_servers
    for group, server in product(range(len(loads)), range(num_servers)):
        yield (server, group), group + (server - (num_servers - 1) / 2) * width, width * 0.95
    axes.set_xticks(range(len(loads)), loads, fontsize=9)
    axes.margins(y=0.12)


def _three_digits(value: float) -> str:
    """Or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
