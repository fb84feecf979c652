"""How fast a start is that finds its quantized model in the cache: reading and verifying, and the whole start.

    python -m tests.benchmarks.bench_artifact --output FILE.json

Run it on an idle machine. A read is compared with one of the same file, by the same system call into fresh memory,
right before it; a start with one of the demo model. `cold` means that no byte of the file is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from service.loading import memory
from service.loading.artifact import BLOCK_BYTES, DATA_NAME
from service.loading.artifact_read import OpenArtifact
from tests.benchmarks.bench_engine import machine
from tests.benchmarks.bench_start import start
from tests.e2e.support import started
from tests.large import write_large_checkpoint
from tests.models import build_tokenizer

RECIPE = "w8a16"
MB = 10**6


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_plainly(path: Path) -> float:
    """Seconds of a read into fresh memory, in the pieces that an artifact is read in."""
    num_bytes = path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    try:
        started_at = time.perf_counter()
        view = memoryview(torch.empty(num_bytes, dtype=torch.uint8).numpy().data)
        done = 0
        while done < num_bytes:
            done += os.preadv(fd, [view[done : done + 8 * BLOCK_BYTES]], done)
        return time.perf_counter() - started_at
    finally:
        os.close(fd)


def read_verified(entry: Path, *, verify_full: bool) -> float:
    """Seconds of opening, reading and checking an artifact."""
    started_at = time.perf_counter()
    with OpenArtifact(entry) as opened:
        opened.read(lambda _: None, verify_full=verify_full)
    return time.perf_counter() - started_at


def measure_reads(entry: Path, num_rounds: int) -> list[dict[str, Any]]:
    """Pairs of reads, cold and warm, and one that also takes the sha256."""
    rows = []
    path = entry / DATA_NAME
    with memory.tight_heap():
        for _ in range(num_rounds):
            for name, is_cold, verify_full in (
                ("cold", True, False),
                ("warm", False, False),
                ("warm, --verify full", False, True),
            ):
                seconds = []
                for read in (
                    partial(read_plainly, path),
                    partial(read_verified, entry, verify_full=verify_full),
                ):
                    if is_cold:
                        forget(path)
                    seconds.append(read())
                rows.append(
                    {"file": name, "plain_s": seconds[0], "verified_s": seconds[1], "ratio": seconds[1] / seconds[0]}
                )
    return rows


def write_artifact(arguments: list[str]) -> dict[str, Any]:
    """Start without an artifact, until it is written."""
    with started("--threads", "auto", *arguments) as server, server.client() as client:
        server.wait_for_log("the quantized model is cached in")
        report = client.get("/v1/quantization").json()
        return {"load_s": report["total_seconds"], "phase_seconds": report["phase_seconds"]}


def measure_starts(arguments: list[str], num_rounds: int) -> list[dict[str, Any]]:
    """Starts of the demo model and from the cache, in turns."""
    rows = []
    for _ in range(num_rounds):
        demo, cached = start("--kv-memory", "64MiB"), start(*arguments)
        report = cached["report"]
        weight_bytes = sum(report["weight_bytes"][kind] for kind in ("codes", "scales", "unquantized"))
        rows.append(
            {
                "demo_ready_s": demo["ready_s"],
                "cached_ready_s": cached["ready_s"],
                "difference_s": cached["ready_s"] - demo["ready_s"],
                "load_s": report["total_seconds"],
                "phase_seconds": report["phase_seconds"],
                "peak_over_start_and_weights_mb": (
                    cached["peak_bytes"] - report["resident_before_bytes"] - weight_bytes
                )
                / MB,
            }
        )
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_large_checkpoint(Path(temporary) / "large")
        build_tokenizer().save_pretrained(folder)
        arguments = [str(folder), "--quantize", RECIPE, "--dtype", "bfloat16", "--kv-memory", "64MiB"]
        arguments += ["--cache-dir", temporary, "--cache-limit", "32GiB"]
        first = write_artifact(arguments)
        starts = measure_starts(arguments, options.rounds)
        (entry,) = (path for path in (Path(temporary) / "pennyweight").iterdir() if path.is_dir())
        reads = measure_reads(entry, options.rounds)
        num_bytes = (entry / DATA_NAME).stat().st_size
    names = dict.fromkeys(row["file"] for row in reads)
    result = {
        "machine": machine(),
        "artifact_mb": num_bytes / MB,
        "first_start": first,
        "read_ratio": {name: median(row["ratio"] for row in reads if row["file"] == name) for name in names},
        "start_difference_s": median(row["difference_s"] for row in starts),
        "reads": reads,
        "starts": starts,
    }
    text = json.dumps(result, indent=2)
    options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
