"""The figures of `pennyweight evaluate` as a picture: what each recipe costs against what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from service.reports.evaluate import EvaluationReport, EvaluationRow

_GREY = "#8c8c8c"
_MARKERS = "osD^v"
_LEGEND_COLUMNS = 6
_MAX_NAME_CHARACTERS = 60
_INCHES = (12.0, 4.8)
_DPI = 100


def draw(report: EvaluationReport, path: Path) -> None:
    """Write a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    divergence, perplexity, agreement = figure.subplots(1, 3)
    quantized = report.rows[1:]
    _draw(divergence, quantized, lambda row: row.kl_mean_nats)
    if any(row.kl_mean_nats > 0 for row in quantized):
        divergence.set_yscale("log")
    divergence.set_title("mean KL(none || recipe), nats", fontsize=9)
    _draw(perplexity, quantized, lambda row: row.perplexity)
    perplexity.axhline(report.rows[0].perplexity, color=_GREY, linestyle="--", linewidth=1)
    perplexity.set_title("perplexity (dashed: none)", fontsize=9)
    _draw(agreement, quantized, lambda row: row.top1_ratio)
    agreement.axhline(1, color=_GREY, linestyle="--", linewidth=1)
    agreement.set_title("same likeliest token as none", fontsize=9)
    handles = [Line2D([], [], linestyle="", **style) for style in _styles(len(quantized))]
    names = [row.recipe[:_MAX_NAME_CHARACTERS] for row in quantized]
    if quantized:
        figure.legend(handles, names, fontsize=9, loc="outside lower center", ncols=min(len(names), _LEGEND_COLUMNS))
    name = report.model[:_MAX_NAME_CHARACTERS]
    title = f"{name}: quality against size, {report.num_tokens} tokens of {Path(report.text).name}"
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.savefig(path, format="png", metadata={"Title": title, "Description": report.arithmetic})


def _draw(axes: Axes, rows: Sequence[EvaluationRow], quality: Callable[[EvaluationRow], float]) -> None:
    """A point for each recipe, as the legend has it."""
    for row, style in zip(rows, _styles(len(rows)), strict=True):
        axes.plot([row.bits_per_parameter], [quality(row)], linestyle="", markersize=8, **style)
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.3)
    axes.set_xlabel("bits per parameter", fontsize=9)


def _styles(num_rows: int) -> list[dict[str, Any]]:
    """Colours from one end of a scale to the other, and shapes in turns."""
    scale = colormaps["turbo"]
    return [
        {"color": scale((index + 0.5) / num_rows), "marker": _MARKERS[index % len(_MARKERS)]}
        for index in range(num_rows)
    ]
