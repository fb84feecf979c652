"""What `pennyweight inspect` tells: what a recipe makes of each layer, as JSON, or as a table for people."""

from __future__ import annotations

import sys
from dataclasses import asdict
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from service.loading.report import LayerReport, LoadReport
from service.reports.terminal import FILE_WIDTH

_MB = 1e6


def inspection_as_dict(name: str, report: LoadReport) -> dict[str, Any]:
    """Everything as JSON takes it."""
    return {
        "model": name,
        "recipe": report.recipe,
        "dtype": report.dtype,
        "layers": [asdict(layer) for layer in report.layers],
        "totals": totals(report),
    }


def totals(report: LoadReport) -> dict[str, Any]:
    """Sums over the model; the errors are of layers that are quantized, null where there are none.

    Of tensors that are neither linear nor embedding weights (norms, biases) there is no layer, but they count.
    """
    errors = [layer.relative_error for layer in quantized_layers(report)]
    return {
        "original_bytes": report.original_bytes,
        "weight_bytes": asdict(report.weight_bytes) | {"total": report.weight_bytes.total},
        "saving_ratio": report.saving_ratio,
        "bits_per_parameter": report.bits_per_parameter,
        "num_parameters": report.num_parameters,
        "num_layers": len(report.layers),
        "num_quantized_layers": len(errors),
        "relative_error_max": max(errors, default=None),
        "relative_error_mean": fmean(errors) if errors else None,
    }


def quantized_layers(report: LoadReport) -> list[LayerReport]:
    """Those with codes of their own."""
    return [layer for layer in report.layers if layer.scheme != "none" and layer.bytes]


def worst_layer(report: LoadReport) -> LayerReport:
    """The layer with the largest error; the first of several."""
    return max(quantized_layers(report), key=lambda layer: layer.relative_error)


def print_inspection(name: str, report: LoadReport, console: Console | None = None) -> None:
    """A line for each layer, and the sums below."""
    console = console or Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    table = Table(title=f"{name} as {report.recipe}", title_justify="left")
    for column in ("layer", "shape", "scheme", "MB", "bits/weight", "SQNR dB", "error", "reason"):
        is_text = column in ("layer", "scheme", "reason")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column not in ("layer", "reason"))
    for layer in report.layers:
        is_lossless = layer.sqnr_db is None
        table.add_row(
            layer.name,
            " x ".join(map(str, layer.shape)),
            layer.scheme,
            f"{layer.bytes / _MB:.3f}",
            f"{layer.bits_per_weight:.2f}",
            "-" if is_lossless else f"{layer.sqnr_db:.1f}",
            "-" if is_lossless else f"{layer.relative_error:.3%}",
            layer.reason,
        )
    console.print(table, markup=False, highlight=False)
    sums = totals(report)
    figures = [
        f"{report.weight_bytes.total / _MB:.3f} MB instead of {report.original_bytes / _MB:.3f} at {report.dtype}, "
        f"{report.saving_ratio:.1%} less; {report.bits_per_parameter:.2f} bits for each parameter",
        f"{sums['num_quantized_layers']} of {sums['num_layers']} layers have codes of their own",
    ]
    if sums["num_quantized_layers"]:
        figures[1] += (
            f"; error {sums['relative_error_mean']:.3%} on average, {sums['relative_error_max']:.3%} at most "
            f"({worst_layer(report).name})"
        )
    for line in figures:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
