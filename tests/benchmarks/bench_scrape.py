"""What a scrape takes while 16 sequences run, and what it takes from them.

    python -m tests.benchmarks.bench_scrape --output FILE.json

Run it on an idle machine; it takes about half a minute. The demo model computes 16 texts at a time with one thread.

- `http`: seconds of `GET /metrics` on an open connection to a server in a process of its own; `loop_ms` is what the
  thread of the event loop computes for one (its own clock in `/proc`) on an idle server.
- `in_process`: seconds of the same text in a process that has engine and event loop, without HTTP.
- `steps`: mean seconds of a step of that server without scrapes and with ten per second, in turns. A scrape holds
  no lock that a step needs; the two share the interpreter.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.api.support import run_service
from tests.benchmarks.bench_engine import machine
from tests.benchmarks.bench_http import percentile
from tests.e2e.support import ServerProcess, ready

TARGET_MS = 5.0
NUM_SEQUENCES = 16
NUM_TOKENS = 400
SCRAPES_PER_S = 10
FIELDS = {"prompt": list(range(300, 332)), "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}


@contextmanager
def sequences(host: str, port: int, num_sequences: int = NUM_SEQUENCES) -> Iterator[None]:
    """Keep so many texts running."""
    ended = threading.Event()

    def generate() -> None:
        connection = http.client.HTTPConnection(host, port)
        while not ended.is_set():
            connection.request("POST", "/v1/completions", json.dumps(FIELDS), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
            assert answer.status == 200, data
        connection.close()

    with ThreadPoolExecutor(num_sequences) as pool:
        clients = [pool.submit(generate) for _ in range(num_sequences)]
        try:
            yield
        finally:
            ended.set()
        for client in clients:
            client.result()


class Scraper:
    """One open connection to a server."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port)

    def scrape(self) -> tuple[float, str]:
        """Seconds until all of the text is there, and the text."""
        began = time.perf_counter()
        self._connection.request("GET", "/metrics")
        answer = self._connection.getresponse()
        data = answer.read()
        took_s = time.perf_counter() - began
        assert answer.status == 200
        return took_s, data.decode()

    def values(self) -> dict[str, float]:
        """Sums of the samples by name."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.scrape()[1]):
            for sample in family.samples:
                name = sample.name.removeprefix("pennyweight_")
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def wait_for_sequences(self) -> None:
        """Wait until all of them run."""
        while self.values()["requests_running"] < NUM_SEQUENCES:
            time.sleep(0.01)


def figures(seconds: list[float]) -> dict[str, float]:
    """Of a list of times."""
    return {
        "scrapes": len(seconds),
        "median_ms": statistics.median(seconds) * 1e3,
        "p99_ms": percentile(seconds, 0.99) * 1e3,
        "max_ms": max(seconds) * 1e3,
    }


def measure_http(scraper: Scraper, seconds: float) -> dict[str, float]:
    """Scrapes at an even rate."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        took.append(scraper.scrape()[0])
        time.sleep(1 / SCRAPES_PER_S)
    return figures(took) | {"bytes": len(scraper.scrape()[1])}


def measure_loop_ms(scraper: Scraper, process: ServerProcess, num_scrapes: int) -> float:
    """What the event loop computes for a scrape."""
    pid = process.process.pid
    clock = Path(f"/proc/{pid}/task/{pid}/schedstat")
    before = int(clock.read_text().split()[0])
    for _ in range(num_scrapes):
        scraper.scrape()
    return (int(clock.read_text().split()[0]) - before) / 1e6 / num_scrapes


def mean_step_s(scraper: Scraper, seconds: float, *, scrapes_per_s: float) -> float:
    """Mean of the steps of some seconds."""
    before = scraper.values()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        time.sleep(1 / scrapes_per_s if scrapes_per_s else seconds)
        if scrapes_per_s:
            scraper.scrape()
    after = scraper.values()
    spent = after["step_seconds_sum"] - before["step_seconds_sum"]
    return spent / (after["step_seconds_count"] - before["step_seconds_count"])


def measure_steps(scraper: Scraper, seconds: float, num_rounds: int) -> dict[str, float]:
    """Steps without and with scrapes, in turns."""
    steps: dict[float, list[float]] = {0: [], SCRAPES_PER_S: []}
    for _ in range(num_rounds):
        for rate, found in steps.items():
            found.append(mean_step_s(scraper, seconds / num_rounds / 2, scrapes_per_s=rate))
    alone, scraped = (statistics.median(found) for found in steps.values())
    return {
        "scrapes_per_s": SCRAPES_PER_S,
        "alone_ms": alone * 1e3,
        "scraped_ms": scraped * 1e3,
        "ratio": scraped / alone,
    }


def measure_in_process(num_scrapes: int) -> dict[str, float]:
    """The text, made by another thread than those of engine and event loop."""
    settings: dict[str, Any] = {"device": "cpu", "threads": 1, "kv_memory": 2**27}
    with run_service(settings) as running, sequences("127.0.0.1", running.port):
        scraper = Scraper("127.0.0.1", running.port)
        scraper.wait_for_sequences()
        gc.freeze()  # as a server does that has its process for itself
        took: list[float] = []
        for _ in range(num_scrapes):
            began = time.perf_counter()
            running.service.state.metrics.text().encode()
            took.append(time.perf_counter() - began)
            time.sleep(1 / SCRAPES_PER_S / 5)
    return figures(took)


def measure(seconds: float) -> dict[str, Any]:
    """All figures."""
    with ready() as (process, client):
        assert client.base_url.port is not None
        scraper = Scraper(client.base_url.host, client.base_url.port)
        with sequences(client.base_url.host, client.base_url.port):
            scraper.wait_for_sequences()
            over_http = measure_http(scraper, seconds)
            steps = measure_steps(scraper, seconds, num_rounds=4)
        over_http["loop_ms"] = measure_loop_ms(scraper, process, num_scrapes=int(20 * seconds))
    return {
        "machine": machine(),
        "sequences": NUM_SEQUENCES,
        "http": over_http,
        "in_process": measure_in_process(int(20 * seconds)),
        "steps": steps,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each part, about")
    arguments = parser.parse_args()
    result = measure(arguments.seconds)
    result["target"] = {
        name: {"p99_ms": TARGET_MS, "met": result[name]["p99_ms"] <= TARGET_MS} for name in ("http", "in_process")
    }
    text = json.dumps(result, indent=2)
    arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
