"""How long the comparison with the original takes beside a service, and what it takes from requests.

    python -m tests.benchmarks.bench_fidelity --output FILE.json

Run it on an idle machine; it takes about a quarter of an hour. For each model the real command is started anew:

- `idle`: `seconds` of the comparison while nothing is asked, beside `ready_s`, from the command until requests are
  taken, and `load_s` of the load report, first byte read to last buffer filled.
- `busy`: clients ask without pause from the start on. Tokens per second while it runs (at most `BUSY_S`), beside those
  of a service without it in as much time; `slowdown` is the share that was lost.
- `before_ready`: `seconds` of the comparison where it goes first, on all threads, and the peak of the process by the
  plan and as measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tests.benchmarks.bench_engine import machine
from tests.benchmarks.bench_scrape import sequences
from tests.e2e.support import ROOT, ServerProcess, started

SHAPES = ("smollm-135m", "llama-800m")
NUM_CLIENTS = (1, 8)
MAX_SLOWDOWN, MAX_LOADS = 0.15, 2.0
BUSY_S = 30.0
THREADS = "auto"
_POLL_S = 0.1


def fidelity(client: httpx.Client) -> dict[str, Any]:
    """What the report says of it."""
    found: dict[str, Any] = client.get("/v1/quantization").json()["fidelity"]
    return found


def wait_for_end(client: httpx.Client) -> dict[str, Any]:
    """Results, as soon as they are there."""
    while (found := fidelity(client))["state"] == "running":
        time.sleep(_POLL_S)
    assert found["state"] == "done", found
    return found


def num_tokens(client: httpx.Client) -> float:
    """Tokens that were computed so far."""
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("pennyweight_engine_tokens_total{")).split()[-1])


def start(folder: Path, mode: str) -> Any:
    """Serve a model with all threads."""
    return started(str(folder), "--threads", THREADS, "--fidelity", mode, "--kv-memory", "64MiB")


def measure_idle(folder: Path) -> dict[str, Any]:
    """Nothing is asked meanwhile."""
    began = time.monotonic()
    with start(folder, "background") as server, server.client() as client:
        server.wait_for_log("ready: ")
        ready_s = time.monotonic() - began
        ready_peak = server.peak_bytes()
        found = wait_for_end(client)
        report = client.get("/v1/quantization").json()
        return {
            "seconds": found["seconds"],
            "ready_s": ready_s,
            "load_s": report["total_seconds"],
            "loads": found["seconds"] / ready_s,
            "peak_over_ready_mb": (server.peak_bytes() - ready_peak) / 10**6,
            "kl_mean_nats": found["kl_mean_nats"],
        }


def measure_busy(folder: Path, num_clients: int) -> dict[str, Any]:
    """Clients ask without pause, of a service that compares and then of one that does not."""
    compared, tokens_during, state = _tokens_per_s(folder, num_clients, "background", BUSY_S)
    _, tokens_without, _ = _tokens_per_s(folder, num_clients, "off", compared)
    return {
        "clients": num_clients,
        "seconds": compared,
        "state": state,
        "tokens_per_s_during": tokens_during,
        "tokens_per_s_without": tokens_without,
        "slowdown": 1 - tokens_during / tokens_without,
    }


def _tokens_per_s(folder: Path, num_clients: int, mode: str, most_s: float) -> tuple[float, float, str]:
    """Seconds until a comparison ends, or `most_s`; tokens per second in them; how far it has come."""
    with start(folder, mode) as server, server.client() as client:
        server.wait_for_log("ready: ")
        with sequences(client.base_url.host, client.base_url.port or 80, num_clients):
            tokens, began = num_tokens(client), time.monotonic()
            while (passed_s := time.monotonic() - began) < most_s:
                if mode != "off" and fidelity(client)["state"] != "running":
                    break
                time.sleep(_POLL_S)
            return passed_s, (num_tokens(client) - tokens) / passed_s, fidelity(client)["state"]


def measure_first(folder: Path) -> dict[str, Any]:
    """It goes before the service is ready."""
    with start(folder, "before-ready") as server, server.client() as client:
        server.wait_for_log("ready: ")
        report = client.get("/v1/quantization").json()
        planned = next(int(line.split(", ")[-1].split()[0]) for line in server.log if "were planned" in line)
        return {
            "seconds": report["fidelity"]["seconds"],
            "planned_peak_bytes": planned,
            "peak_bytes": server_peak(server, report),
        }


def server_peak(server: ServerProcess, report: dict[str, Any]) -> int:
    """Of the process until it was ready."""
    assert report["peak_bytes"]["host"] <= server.peak_bytes()
    return int(report["peak_bytes"]["host"])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of deploy/make_model.py")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / shape
            command = [sys.executable, "deploy/make_model.py", "--shape", shape, str(folder)]
            subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
            rows.append(
                {
                    "shape": shape,
                    "idle": [measure_idle(folder) for _ in range(arguments.rounds)],
                    "busy": [measure_busy(folder, count) for count in NUM_CLIENTS for _ in range(arguments.rounds)],
                    "before_ready": measure_first(folder),
                }
            )
    bounds = {"max_slowdown": MAX_SLOWDOWN, "max_loads": MAX_LOADS}
    text = json.dumps({"machine": machine(), "bounds": bounds, "rows": rows}, indent=2)
    arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
