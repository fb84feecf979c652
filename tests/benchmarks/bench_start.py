"""How fast and how lean a start is: the demo model from the command on, and a load of 1.6 GB of bf16 weights.

    python -m tests.benchmarks.bench_start --output FILE.json

Run it on an idle machine. Each figure is taken from a process of its own, through the real command; checkpoint
files are in the page cache. Load seconds are those of the load report: first byte read to last buffer filled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_engine import machine
from tests.large import write_large_checkpoint
from tests.models import build_tokenizer

RECIPES = ("w8a16", "w4a16-g64", "none")
POLL_S = 0.02
TIMEOUT_S = 300.0
MB = 10**6


def start(*arguments: str) -> dict[str, Any]:
    """Serve until ready; seconds from the command to `/livez` and `/readyz`, and the load report."""
    began = time.monotonic()
    command = [sys.executable, "-m", "service", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(r"listening on (http://\S+)", line)))
        live_s = wait_for(f"{url}/livez") - began
        ready_s = wait_for(f"{url}/readyz") - began
        with urllib.request.urlopen(f"{url}/v1/quantization", timeout=30) as response:
            report = json.load(response)
        return {"livez_s": live_s, "ready_s": ready_s, "report": report, "peak_bytes": peak_bytes(process.pid)}
    finally:
        process.terminate()
        process.communicate(timeout=60)


def wait_for(url: str) -> float:
    """The moment at which a probe answers 200."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return time.monotonic()
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            pass
        time.sleep(POLL_S)
    raise TimeoutError(url)


def peak_bytes(pid: int) -> int:
    """Most resident bytes of a process so far."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


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
