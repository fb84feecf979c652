"""Peak memory of a real load: 1.6 GB of bf16 weights through the real command."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.support import ready
from tests.large import write_large_checkpoint
from tests.models import build_tokenizer

pytestmark = pytest.mark.e2e

MB = 10**6


class LoadFigures(NamedTuple):
    """What the kernel and the service say of one load.

    Attributes:
        peak_bytes: most resident bytes of the process until ready (VmHWM).
        planned_bytes: most that the service said it would need, before it read weights.
        report: body of `/v1/quantization`.
        exported_peak_bytes: `pennyweight_load_peak_bytes{where="host"}`.
    """

    peak_bytes: int
    planned_bytes: int
    report: dict[str, Any]
    exported_peak_bytes: float


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_large_checkpoint(tmp_path_factory.mktemp("large") / "large")
    build_tokenizer().save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


def serve_and_measure(folder: Path, recipe: str, fidelity: str = "off", *more: str) -> LoadFigures:
    options = ["--device", "cpu", "--dtype", "bfloat16", "--kv-memory", "64MiB"]
    with ready(str(folder), "--quantize", recipe, "--fidelity", fidelity, *options, *more) as (server, client):
        peak_bytes = server.peak_bytes()
        report = client.get("/v1/quantization").json()
        metrics = client.get("/metrics").text
    exported = re.search(r'^pennyweight_load_peak_bytes\{.*where="host".*\} (\S+)$', metrics, re.M)
    planned = re.search(r"(\d+) at most were planned$", "\n".join(server.log), re.M)
    assert exported is not None
    assert planned is not None
    return LoadFigures(peak_bytes, int(planned[1]), report, float(exported[1]))


@pytest.mark.nightly
def test_neither_writing_into_the_cache_nor_starting_from_it_takes_more(large_checkpoint: Path, tmp_path: Path) -> None:
    cache = ("--cache-dir", str(tmp_path), "--cache-limit", "4GiB", "--fidelity", "off", "--dtype", "bfloat16")
    with ready(str(large_checkpoint), *cache, "--kv-memory", "64MiB") as (server, _):
        server.wait_for_log("the quantized model is cached in")
        peak_of_writer = server.peak_bytes()
    peak, planned, report, _ = serve_and_measure(large_checkpoint, "w8a16", "off", *cache)
    assert report["phase_seconds"]["quantize"] == 0, "it came from the cache"
    weights = sum(report["weight_bytes"][kind] for kind in ("codes", "scales", "unquantized"))
    assert peak <= report["resident_before_bytes"] + weights + 200 * MB
    assert max(peak, peak_of_writer) <= planned


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-g64"])
def test_the_peak_until_ready_is_the_quantized_size_and_at_most_200_mb(large_checkpoint: Path, recipe: str) -> None:
    peak, planned, report, exported_peak = serve_and_measure(large_checkpoint, recipe)
    weights = sum(report["weight_bytes"][kind] for kind in ("codes", "scales", "unquantized"))
    allowed = report["resident_before_bytes"] + weights + 200 * MB
    assert peak <= allowed, f"{(peak - allowed) / MB:.0f} MB too many"
    assert peak <= planned
    # The opposite: with the unquantized weights in memory at any time the bound could not hold.
    assert report["original_bytes"] > weights + 200 * MB
    assert exported_peak == pytest.approx(peak, rel=0.05)


@pytest.mark.nightly
def test_a_comparison_that_goes_first_stays_within_the_plan(large_checkpoint: Path) -> None:
    peak, planned, report, _ = serve_and_measure(large_checkpoint, "w8a16", "before-ready")
    assert report["fidelity"]["state"] == "done"
    assert peak <= planned
