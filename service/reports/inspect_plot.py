"""The figures of `pennyweight inspect` as pictures: errors by layer, histograms, and the codes of a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from service.loading.report import LoadReport
from service.reports.histograms import Histogram
from service.reports.inspect import quantized_layers, worst_layer
from service.reports.inspect_watch import EncodingWatch, LayerCounts

NAMES: Final = ("errors.png", "histograms.png", "codes.png")
"""Files that are written."""

_COLOURS = ("#1f6fb4", "#f2a33a", "#3a9d5d", "#c0504d", "#7f5ab6", "#8c8c8c")
_GREY = "#8c8c8c"
_MAX_NAME_CHARACTERS = 80
_MAX_NAMED_LAYERS = 60
_BINS_PER_STEP = 4
_DPI = 100


def draw(name: str, report: LoadReport, watch: EncodingWatch, folder: Path) -> None:
    """Write the PNGs of `NAMES` into a folder that exists; at least one layer must be quantized.

    Raises:
        OSError: one of them cannot be written.
    """
    title = f"{name[:_MAX_NAME_CHARACTERS]} as {report.recipe[:_MAX_NAME_CHARACTERS]}"
    worst = worst_layer(report).name
    for file, figure in zip(
        NAMES,
        (_errors(report), _histograms(watch, worst), _codes(watch.layers[worst], worst)),
        strict=True,
    ):
        figure.suptitle(title, fontsize=11, parse_math=False)
        figure.savefig(folder / file, format="png", metadata={"Title": title})


def _errors(report: LoadReport) -> Figure:
    """A bar for each quantized layer in module order, a colour for each scheme."""
    layers = quantized_layers(report)
    figure = Figure(figsize=(12.0, 5.5), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    schemes = list(dict.fromkeys(layer.scheme for layer in layers))
    for index, scheme in enumerate(schemes):
        places = [place for place, layer in enumerate(layers) if layer.scheme == scheme]
        heights = [layers[place].relative_error for place in places]
        axes.bar(places, heights, color=_COLOURS[index % len(_COLOURS)], label=scheme, width=0.85)
    step = -(-len(layers) // _MAX_NAMED_LAYERS)
    named = range(0, len(layers), step)
    axes.set_xticks(named, [layers[place].name for place in named], rotation=90, fontsize=7, parse_math=False)
    axes.set_ylabel("||w - w'|| / ||w||")
    axes.set_title("relative error of each quantized layer", fontsize=9)
    axes.margins(x=0.01)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(fontsize=8, loc="outside upper right")
    return figure


def _histograms(watch: EncodingWatch, worst: str) -> Figure:
    """Weights and errors of all quantized layers, and of the one with the largest error."""
    figure = Figure(figsize=(12.0, 7.0), dpi=_DPI, layout="constrained")
    layer = watch.layers[worst]
    rows = (
        (f"all {len(watch.layers)} quantized layers", watch.together()),
        (f"largest error: {worst}", (layer.weights, layer.decoded, layer.errors)),
    )
    for (left, right), (name, (weights, decoded, errors)) in zip(figure.subplots(2, 2), rows, strict=True):
        _draw_histogram(left, weights, _GREY, "weights")
        _draw_histogram(left, decoded, _COLOURS[0], "decoded")
        _draw_histogram(right, errors, _COLOURS[3], "decoded - weight")
        left.set_title(f"{name}: weights before and after", fontsize=9, parse_math=False)
        right.set_title(f"{name}: error", fontsize=9, parse_math=False)
    return figure


def _draw_histogram(axes: Axes, histogram: Histogram, colour: str, label: str) -> None:
    """Share of the weights in each bin, on a logarithmic scale; bins beyond the last weight are left out.

    Four bins are drawn as one: narrower ones would show the grid of 16-bit weights.
    """
    counts = histogram.counts.reshape(-1, _BINS_PER_STEP).sum(1)
    used = np.flatnonzero(counts)
    first, last = used[0], used[-1] + 1
    edges = histogram.edges[::_BINS_PER_STEP][first : last + 1]
    axes.stairs(counts[first:last] / counts.sum(), edges, color=colour, label=label, fill=True, alpha=0.55)
    axes.set_yscale("log")
    axes.set_ylabel("share of the weights", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _codes(layer: LayerCounts, name: str) -> Figure:
    """How often each code occurs, and the first codes as a picture."""
    figure = Figure(figsize=(12.0, 6.5), dpi=_DPI, layout="constrained")
    above, below = figure.subplots(2, 1)
    used = np.flatnonzero(layer.code_counts)
    first, last = used[0], used[-1] + 1
    codes = np.arange(first, last) + layer.first_code
    above.bar(codes, layer.code_counts[first:last] / layer.code_counts.sum(), color=_COLOURS[0], width=0.9)
    above.set_title(f"{name} ({layer.scheme.name}): share of each code", fontsize=9, parse_math=False)
    above.grid(axis="y", alpha=0.3)
    image = below.imshow(layer.codes, aspect="auto", interpolation="nearest", cmap="viridis")
    rows, columns = layer.codes.shape
    below.set_title(f"its codes: first {rows} outputs, first {columns} inputs", fontsize=9)
    figure.colorbar(image, ax=below)
    return figure
