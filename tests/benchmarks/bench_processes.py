"""The engine in the service's process beside the same engine in a process of its own, at 64 streams.

    python -m tests.benchmarks.bench_processes --output FILE.json

Both are whole services, started once, and take turns: in each round every one answers 64 greedy streams of a third
process, which only reads. Tokens per second are those of all streams together, CPU seconds those of the service's
processes. On few cores the two processes share them with torch's threads and with the reader, so the figure tells
what a second process brings on such a machine; on one with idle cores it can bring more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from service.reports.hardware import describe_machine
from tests.e2e.support import ROOT, ServerProcess

NUM_STREAMS = 64
MODULES = {"in-process": "service", "two-processes": "tests.benchmarks.two_processes"}
MAX_TOKENS = {"demo": 128, "smollm-135m": 32}
"""Tokens of each stream, by model."""
MAX_RATIO = 1.05
"""How much faster two processes may be before the engine moves."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one service did in one round."""

    path: str
    tokens_per_s: float
    cpu_s: float
    seconds: float


class Served:
    """A started service under load.

    Args:
        path: a key of `MODULES`.
        arguments: of `pennyweight serve`.
    """

    def __init__(self, path: str, arguments: Sequence[str]) -> None:
        self.path = path
        self._server = ServerProcess(tuple(arguments), {}, module=MODULES[path])
        with self._server.client() as client:
            assert client.base_url.port is not None
            self._port = client.base_url.port
        self._server.wait_for_log("ready: ")

    def close(self) -> None:
        self._server.close()

    def turn(self, max_tokens: int) -> Turn:
        """Answer all streams once."""
        before = self._cpu_s()
        command = [sys.executable, "-m", "tests.benchmarks.streams", *map(str, (self._port, NUM_STREAMS, max_tokens))]
        seconds = float(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)
        return Turn(self.path, NUM_STREAMS * max_tokens / seconds, self._cpu_s() - before, seconds)

    def _cpu_s(self) -> float:
        own = psutil.Process(self._server.process.pid)
        times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
        return sum(part.user + part.system for part in times)


@contextmanager
def checkpoint(model: str) -> Iterator[list[str]]:
    """What `serve` needs to be told of a model."""
    if model == "demo":
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / model
        make = [sys.executable, "-m", "deploy.make_model", "--shape", model, str(out)]
        subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
        yield [str(out), "--max-model-len", "1024", "--kv-memory", "256MiB"]


def measure(model: str, num_rounds: int, threads: str) -> dict[str, Any]:
    """All rounds of one model, but a first one that warms up."""
    with ExitStack() as stack:
        arguments = stack.enter_context(checkpoint(model))
        services = []
        for path in MODULES:
            services.append(Served(path, ["--threads", threads, "--queue-timeout", "600", *arguments]))
            stack.callback(services[-1].close)
        rounds: list[dict[str, Turn]] = []
        for number in range(num_rounds + 1):
            order = services if number % 2 else services[::-1]
            rounds.append({service.path: service.turn(MAX_TOKENS[model]) for service in order})
    del rounds[0]
    ratios = sorted(turns["two-processes"].tokens_per_s / turns["in-process"].tokens_per_s for turns in rounds)
    return {
        "model": model,
        "streams": NUM_STREAMS,
        "tokens_of_each": MAX_TOKENS[model],
        "speed_ratio": statistics.median(ratios),
        "speed_ratios": ratios,
        "cpu_ratio": statistics.median(turns["two-processes"].cpu_s / turns["in-process"].cpu_s for turns in rounds),
        "median": {
            path: {
                "tokens_per_s": statistics.median(turns[path].tokens_per_s for turns in rounds),
                "cpu_s": statistics.median(turns[path].cpu_s for turns in rounds),
            }
            for path in MODULES
        },
        "turns": [asdict(turn) for turns in rounds for turn in turns.values()],
    }


def verdict(models: Sequence[dict[str, Any]]) -> str:
    """What the figures decide, and what they do not."""
    cores = len(os.sched_getaffinity(0))
    worst = max(model["speed_ratio"] for model in models)
    place = "moves to a process of its own" if worst > MAX_RATIO else "stays in the service's process"
    return (
        f"two processes reach {worst:.2f} of the speed of one, at most {MAX_RATIO} is allowed: the engine {place}. "
        f"Measured on {cores} cores, which torch's threads, HTTP and the reader of the streams share: with more cores "
        f"HTTP in a process of its own takes no time from the engine, and the ratio can be higher."
    )


def main() -> None:
    """Run the comparison, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=10, help="how often the services take turns")
    parser.add_argument("--models", default=",".join(MAX_TOKENS), help="which models, separated by commas")
    parser.add_argument("--threads", default="auto", help="of the engine, as for the command")
    arguments = parser.parse_args()
    models = [measure(model, arguments.rounds, arguments.threads) for model in arguments.models.split(",")]
    machine = describe_machine(torch.get_num_threads())
    text = json.dumps(
        {"machine": machine, "threads": arguments.threads, "verdict": verdict(models), "models": models}, indent=1
    )
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
