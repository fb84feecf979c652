"""Every scheme from a checkpoint to logits: the stock model's with the decoded weights, and the planned bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.numerics.schemes import NAMED
from tests.loading.support import load, logits, round_weights, stock
from tests.models import write_checkpoint

SCHEMES = [
    *("w8a16-asym", "w8a16-g64-float", "w6a16", "w5a16-g32-sym", "w4a16-row", "w4a16-float", "w3a16", "w2a16-g16"),
    *("absmax", "zeropoint", "w4a16+mse", "w3a16-asym+mse", "w4a16-sym+mse", "w4a16+hqq", *NAMED),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are of 256 weights but for one projection of each layer, of 320."""
    folder = tmp_path_factory.mktemp("schemes") / "m"
    return write_checkpoint("llama", folder, hidden_size=256, intermediate_size=320, num_hidden_layers=3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_stock_model_with_decoded_weights(scheme: str, checkpoint: Path) -> None:
    loaded = load(checkpoint, scheme)  # which checks that it holds what was planned
    reference = stock(checkpoint)
    round_weights(reference, loaded)
    expected, found = logits(reference), logits(loaded.model)
    # Other order of float32 sums and roundings: 3 layers of at most 320 terms, each within 2^-23.
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert (found - logits(stock(checkpoint))).abs().max() > 1e-4 * expected.abs().max()
    held = loaded.report.weight_bytes
    assert min(held.codes, held.scales) > 0
    rows = [row for row in loaded.report.layers if row.scheme != "none"]
    assert held.codes + held.scales == sum(row.bytes for row in rows)
    assert all(row.sqnr_db is not None and row.sqnr_db > 4 for row in rows)


@pytest.mark.parametrize(
    ("scheme", "fallback"), [("q4_k", "q5_0"), ("q5_k", "q5_1"), ("q6_k", "q8_0")], ids=lambda value: str(value)
)
def test_rows_that_a_k_quant_cannot_take_fall_back_and_the_report_says_so(
    scheme: str, fallback: str, checkpoint: Path
) -> None:
    rows = {row.name: row for row in load(checkpoint, scheme).report.layers}
    down, up = (rows[f"model.layers.0.mlp.{name}_proj"] for name in ("down", "up"))
    assert (down.scheme, up.scheme, up.reason) == (fallback, scheme, "")
    assert down.reason == f"rows of 320 weights are no multiple of 256, which {scheme} needs"


def test_a_mixed_scheme_gives_some_layers_more_bits_and_the_report_says_so(checkpoint: Path) -> None:
    report = load(checkpoint, "q4_k_m").report
    rows = {row.name: row for row in report.layers}
    values = [rows[f"model.layers.{index}.self_attn.v_proj"] for index in range(3)]
    assert [row.scheme for row in values] == ["q4_k", "q4_k", "q6_k"]
    assert [row.reason for row in values] == ["", "", "q4_k_m gives this layer 6 bits"]
    assert rows["model.layers.2.mlp.down_proj"].scheme == "q8_0"  # 6 bits, of rows that q6_k does not take
    assert rows["lm_head"].scheme == "w8a16"
    assert (report.recipe, report.scheme) == ("q4_k_m", "q4_k_m")
