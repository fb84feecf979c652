"""A recipe's report by layer, and what its pictures are drawn from."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from service.errors import SettingError
from service.layers.buffers import QuantizedModule
from service.loading.loader import LoadedModel, load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from service.reports.inspect import inspection_as_dict, print_inspection, totals, worst_layer
from service.reports.inspect_options import parse_folder
from service.reports.inspect_plot import NAMES, draw
from service.reports.inspect_watch import SHOWN_COLUMNS, SHOWN_ROWS, EncodingWatch
from tests.loading.support import stock

RECIPE = "w4a16-g32,*.1.*=w8a16"


def inspected(folder: Path, recipe: str = RECIPE) -> tuple[LoadedModel, EncodingWatch]:
    watch = EncodingWatch()
    options = LoadOptions(model=str(folder), recipe=parse_recipe(recipe), device="cpu", dtype="bfloat16")
    return load_model(replace(options, watch=watch), LoadProgress()), watch


def quantized(loaded: LoadedModel, name: str) -> QuantizedModule:
    module = loaded.model.get_submodule(name)
    assert isinstance(module, QuantizedModule)
    return module


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        *((family, RECIPE) for family in ("llama_tied", "gpt2", "mixtral", "gpt_oss")),
        ("llama", "nf4-dq,*.1.*=fp8"),
        ("gpt2", "zeropoint,*.1.*=q5_1"),
    ],
)
def test_counts_are_of_the_weights_that_were_encoded(
    family: str, recipe: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(family)
    loaded, watch = inspected(folder, recipe)
    original = stock(folder)
    parameters = dict(original.named_parameters(remove_duplicate=False))
    rows = {row.name: row for row in loaded.report.layers if row.scheme != "none" and row.bytes}
    assert watch.layers.keys() == rows.keys()
    for name, layer in watch.layers.items():
        weight = parameters[name] if name in parameters else parameters[f"{name}.weight"]
        decoded = quantized(loaded, name).dequantize()
        num_weights = weight.numel()
        assert {int(h.counts.sum()) for h in (layer.weights, layer.decoded, layer.errors)} == {num_weights}
        assert layer.code_counts.sum() == num_weights
        assert 2.0 ** (layer.weights.exponent - 1) < weight.abs().max() <= 2.0**layer.weights.exponent
        assert 2.0 ** (layer.decoded.exponent - 1) < decoded.abs().max() <= 2.0**layer.decoded.exponent
        middles = (layer.errors.edges[1:] + layer.errors.edges[:-1]) / 2
        spread = math.sqrt((layer.errors.counts * middles**2).sum())
        norm = float(weight.detach().double().norm())
        width = layer.errors.edges[1] - layer.errors.edges[0]  # each error is at most half of it from its bin's middle
        assert abs(spread / norm - rows[name].relative_error) <= width / 2 * math.sqrt(num_weights) / norm


def test_codes_are_those_of_the_layer(checkpoint: Callable[[str], Path]) -> None:
    loaded, watch = inspected(checkpoint("llama"), "w8a16")
    for name, layer in watch.layers.items():
        module = quantized(loaded, name)
        weights = module.dequantize()
        codes = (weights / module.scales[: len(weights), None]).round().int()
        assert layer.codes.tolist() == codes[:SHOWN_ROWS, :SHOWN_COLUMNS].tolist()
        found, counts = np.unique(codes.numpy(), return_counts=True)
        used = np.flatnonzero(layer.code_counts)
        assert (used + layer.first_code).tolist() == found.tolist()
        assert layer.code_counts[used].tolist() == counts.tolist()


def test_a_watched_load_gives_the_same_model(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    watched, _ = inspected(folder)
    options = LoadOptions(model=str(folder), recipe=parse_recipe(RECIPE), device="cpu", dtype="bfloat16")
    alone = load_model(options, LoadProgress())
    assert alone.report.weight_hash == watched.report.weight_hash


def test_totals_are_those_of_the_layers(checkpoint: Callable[[str], Path]) -> None:
    loaded, _ = inspected(checkpoint("llama_tied"))
    found = inspection_as_dict("tiny", loaded.report)
    assert (found["model"], found["recipe"]) == ("tiny", RECIPE)
    assert found["layers"][0].keys() >= {
        *("name", "shape", "scheme", "reason", "bytes", "bits_per_weight", "sqnr_db", "relative_error")
    }
    sums = found["totals"]
    others = sum(p.nbytes for name, p in loaded.model.named_parameters() if "norm" in name)
    assert sum(layer["bytes"] for layer in found["layers"]) + others == sums["weight_bytes"]["total"]
    assert sums["relative_error_max"] == worst_layer(loaded.report).relative_error
    assert sums["num_layers"] == sums["num_quantized_layers"] + 1  # the head shares the weight of the embedding


def test_nothing_is_lost_without_quantization(checkpoint: Callable[[str], Path]) -> None:
    loaded, watch = inspected(checkpoint("llama"), "none")
    sums = totals(loaded.report)
    assert watch.layers == {}
    assert (sums["saving_ratio"], sums["num_quantized_layers"], sums["relative_error_max"]) == (0, 0, None)
    assert "0 of 23 layers have codes of their own" in printed(loaded)


def printed(loaded: LoadedModel) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_inspection("tiny", loaded.report, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_a_table_has_a_line_for_each_layer(checkpoint: Callable[[str], Path]) -> None:
    loaded, _ = inspected(checkpoint("llama_tied"))
    text = printed(loaded)
    assert all(layer.name in text for layer in loaded.report.layers)
    assert "shares the weight of model.embed_tokens" in text
    assert f"({worst_layer(loaded.report).name})" in text


def test_pictures_are_drawn(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    loaded, watch = inspected(checkpoint("mixtral"))
    draw("a name with $ and _", loaded.report, watch, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_a_folder_is_made_where_its_parent_is(tmp_path: Path) -> None:
    assert parse_folder(str(tmp_path / "plots")).is_dir()
    assert parse_folder(str(tmp_path / "plots")) == tmp_path / "plots"


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name in ("file", "file/below", "nowhere/below"):
        with pytest.raises(SettingError, match=f"--plot .*{name}: .*; it must be a folder"):
            parse_folder(str(tmp_path / name))
