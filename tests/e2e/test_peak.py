"""Peak memory of a real load: 1.6 GB of bf16 weights through the real command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.large import write_large_checkpoint
from tests.models import build_tokenizer

MB = 10**6
READY_WITHIN_S = 180.0


class LoadFigures(NamedTuple):
    """What the kernel and the service say of one load.

    Attributes:
        peak_bytes: most resident bytes of the process until ready (VmHWM).
        report: body of `/v1/quantization`.
        exported_peak_bytes: `pennyweight_load_peak_bytes{where="host"}`.
    """

    peak_bytes: int
    report: dict[str, Any]
    exported_peak_bytes: float


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_large_checkpoint(tmp_path_factory.mktemp("large") / "large")
    build_tokenizer().save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


def serve_and_measure(folder: Path, recipe: str) -> LoadFigures:
    command = [sys.executable, "-m", "service", "serve", str(folder), "--quantize", recipe]
    options = ["--device", "cpu", "--dtype", "bfloat16", "--kv-memory", "64MiB", "--port", "0"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        url = address(process)
        wait_until_ready(url, process)
        status = Path(f"/proc/{process.pid}/status").read_text()
        report = json.loads(get(f"{url}/v1/quantization"))
        exported = re.search(r'^pennyweight_load_peak_bytes\{.*where="host".*\} (\S+)$', get(f"{url}/metrics"), re.M)
        assert exported is not None
        peak_kb = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)
        assert peak_kb is not None
        return LoadFigures(int(peak_kb[1]) * 1024, report, float(exported[1]))
    finally:
        process.terminate()
        process.communicate(timeout=60)


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"listening on (http://\S+)", line):
            return found[1]
    raise AssertionError("the service ended before it opened its port")


def wait_until_ready(url: str, process: subprocess.Popen[str]) -> None:
    ready = re.compile(r"\bready: ")
    assert process.stderr is not None
    deadline = time.monotonic() + READY_WITHIN_S
    for line in process.stderr:
        if ready.search(line):
            return
        assert time.monotonic() < deadline
    raise AssertionError("the service ended before it was ready")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        text: str = response.read().decode()
        return text


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-g64"])
def test_the_peak_until_ready_is_the_quantized_size_and_at_most_200_mb(large_checkpoint: Path, recipe: str) -> None:
    peak, report, exported_peak = serve_and_measure(large_checkpoint, recipe)
    weights = sum(report["weight_bytes"][kind] for kind in ("codes", "scales", "unquantized"))
    allowed = report["resident_before_bytes"] + weights + 200 * MB
    assert peak <= allowed, f"{(peak - allowed) / MB:.0f} MB too many"
    # The opposite: with the unquantized weights in memory at any time the bound could not hold.
    assert report["original_bytes"] > weights + 200 * MB
    assert exported_peak == pytest.approx(peak, rel=0.05)
