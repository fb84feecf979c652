"""How fast and how lean a start is: the demo model from the command on, and a load of 1.6 GB of bf16 weights.

    python -m tests.benchmarks.bench_start --output FILE.json

Run it on an idle machine. Each figure is taken from a process of its own, through the real command; checkpoint
files are in the page cache. Load seconds are those of the load report: first byte read to last buffer filled.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_engine import machine
from tests.e2e.support import started
from tests.large import write_large_checkpoint
from tests.models import build_tokenizer

RECIPES = ("w8a16", "w4a16-g64", "none")
MB = 10**6


def start(*arguments: str) -> dict[str, Any]:
    """Serve until ready; seconds from the command to `/livez` and to readiness, and the load report."""
    began = time.monotonic()
    with started("--threads", "auto", *arguments) as server, server.client() as client:
        assert client.get("/livez").status_code == 200
        live_s = time.monotonic() - began
        server.wait_for_log("ready: ")
        assert client.get("/readyz").status_code == 200
        ready_s = time.monotonic() - began
        report = client.get("/v1/quantization").json()
        return {"livez_s": live_s, "ready_s": ready_s, "report": report, "peak_bytes": server.peak_bytes()}


def measure_demo(num_rounds: int) -> list[dict[str, float]]:
    """Seconds to live and to ready, of each round."""
    starts = [start() for _ in range(num_rounds)]
    return [{name: figures[name] for name in ("livez_s", "ready_s")} for figures in starts]


def measure_load(folder: Path, recipe: str) -> dict[str, Any]:
    """Figures of one load of the large checkpoint."""
    result = start(str(folder), "--quantize", recipe, "--dtype", "bfloat16", "--kv-memory", "64MiB")
    report = result["report"]
    weight_bytes = sum(report["weight_bytes"][kind] for kind in ("codes", "scales", "unquantized"))
    return {
        "recipe": recipe,
        "load_s": report["total_seconds"],
        "phase_seconds": report["phase_seconds"],
        "weight_mb": weight_bytes / MB,
        "peak_over_start_and_weights_mb": (result["peak_bytes"] - report["resident_before_bytes"] - weight_bytes) / MB,
        "ready_s": result["ready_s"],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_large_checkpoint(Path(temporary) / "large")
        build_tokenizer().save_pretrained(folder)
        loads = [measure_load(folder, recipe) for _ in range(arguments.rounds) for recipe in RECIPES]
    result = {"machine": machine(), "demo": measure_demo(arguments.rounds), "loads": loads}
    text = json.dumps(result, indent=2)
    arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
