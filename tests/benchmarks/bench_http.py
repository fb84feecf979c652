"""What HTTP costs around the engine: one request, one streamed token, too much load, and no load at all.

    python -m tests.benchmarks.bench_http --output FILE.json

Run it on an idle machine; it takes about a minute. A server of the demo model runs in a process of its own, with
one thread for the engine and an API key, and the clients in this one.

- `one_token`: what a client waits for one token more than the engine takes, by the timings in the answer.
- `streamed_token`: what the thread of the event loop computes for a token of a stream (its own clock in
  `/proc`), and by how much a stream takes longer than the same text in one piece.
- `overload`: requests per second that as many clients get as run together, each after the other; answers per second
  when about as many requests arrive, at times that do not depend on answers, of which the most is the peak; what is
  left of that when three times as many arrive; and how long the refused ones wait.
- `idle`: processor time of a server that nobody uses.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import math
import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_engine import machine
from tests.e2e.support import ServerProcess, ready

TARGETS = {
    "one_token_median_ms": 2.0,
    "one_token_p99_by_median": 4.0,
    "streamed_token_ms": 0.3,
    "goodput_ratio": 0.9,  # at least; the others at most
    "refusal_p99_ms": 50.0,
    "idle_core_ratio": 0.01,
}
MAX_NUM_SEQS = 16
MAX_QUEUE = 32
SUSTAINABLE, OVERLOAD = (0.8, 0.9, 1.0, 1.1), 3
"""Loads, by what as many clients get as run together: about what can be sustained, and too much."""
PROMPT = list(range(300, 332))
WARM_REQUESTS = 20


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test."""

    process: ServerProcess
    host: str
    port: int
    key: str

    def headers(self) -> dict[str, str]:
        """Of each request."""
        return {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}

    def loop_seconds(self) -> float:
        """Processor time of the thread of the event loop, which is the first one."""
        pid = self.process.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9

    def all_seconds(self) -> float:
        """Processor time of all threads."""
        tasks = Path(f"/proc/{self.process.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def percentile(values: Sequence[float], ratio: float) -> float:
    """The smallest value that so large a share of all does not exceed."""
    return sorted(values)[max(0, math.ceil(ratio * len(values)) - 1)]


def measure_one_token(target: Target, num_requests: int) -> dict[str, float]:
    """Requests one after the other on one connection."""
    connection = http.client.HTTPConnection(target.host, target.port)
    extra_ms: list[float] = []
    engine_ms: list[float] = []
    loop_s = 0.0
    for number in range(WARM_REQUESTS + num_requests):
        if number == WARM_REQUESTS:
            loop_s = target.loop_seconds()
        # Each has a prompt of its own, so that none finds another's in the cache.
        body = json.dumps({"token_ids": [number % 500 + 10, *PROMPT], "max_tokens": 1, "temperature": 0})
        began = time.perf_counter()
        connection.request("POST", "/generate", body, target.headers())
        answer = connection.getresponse()
        data = answer.read()
        took_ms = (time.perf_counter() - began) * 1e3
        assert answer.status == 200, data
        engine_ms.append(json.loads(data)["timings"]["total_s"] * 1e3)
        extra_ms.append(took_ms - engine_ms[-1])
    connection.close()
    extra_ms = extra_ms[WARM_REQUESTS:]
    median = statistics.median(extra_ms)
    return {
        "requests": num_requests,
        "median_ms": median,
        "p99_ms": percentile(extra_ms, 0.99),
        "p99_by_median": percentile(extra_ms, 0.99) / median,
        "loop_ms": (target.loop_seconds() - loop_s) * 1e3 / num_requests,
        "engine_median_ms": statistics.median(engine_ms[WARM_REQUESTS:]),
    }


def read_text(target: Target, *, num_tokens: int, stream: bool, n: int = 1) -> float:
    """Seconds of one request for `n` texts of a given length."""
    fields = {
        "prompt": PROMPT,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": stream,
        "n": n,
    }
    connection = http.client.HTTPConnection(target.host, target.port)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(fields), target.headers())
    answer = connection.getresponse()
    data = answer.read()
    took_s = time.perf_counter() - began
    assert answer.status == 200, data
    assert not stream or data.endswith(b"data: [DONE]\n\n"), data[-200:]
    connection.close()
    return took_s


def measure_streamed_token(target: Target, num_rounds: int, num_tokens: int) -> dict[str, float]:
    """Streams and whole texts in turns; a stream alone, and 16 in one request."""
    longer_ms: list[float] = []
    loop_ms: dict[int, list[float]] = {1: [], MAX_NUM_SEQS: []}
    read_text(target, num_tokens=num_tokens, stream=True)
    for _ in range(num_rounds):
        whole_s = read_text(target, num_tokens=num_tokens, stream=False)
        before = target.loop_seconds()
        stream_s = read_text(target, num_tokens=num_tokens, stream=True)
        loop_ms[1].append((target.loop_seconds() - before) * 1e3 / num_tokens)
        longer_ms.append((stream_s - whole_s) * 1e3 / num_tokens)
        before = target.loop_seconds()
        read_text(target, num_tokens=num_tokens, stream=True, n=MAX_NUM_SEQS)
        loop_ms[MAX_NUM_SEQS].append((target.loop_seconds() - before) * 1e3 / num_tokens / MAX_NUM_SEQS)
    return {
        "tokens": num_rounds * num_tokens,
        "loop_ms": statistics.median(loop_ms[1]),
        "loop_ms_at_16": statistics.median(loop_ms[MAX_NUM_SEQS]),
        "longer_than_whole_ms": statistics.median(longer_ms),
    }


@dataclass(slots=True)
class Load:
    """What became of requests: when answers came, and how long refusals took."""

    done_at: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    num_sent: int = 0
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def ask(self, target: Target, body: bytes) -> None:
        """Send one request, on a connection that is free or a new one."""
        self.num_sent += 1
        began = time.perf_counter()
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(target.host, target.port)
        head = "".join(f"{name}: {value}\r\n" for name, value in target.headers().items())
        first = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{head}\r\n"
        writer.write(first.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split()[1]))
        status = int(answer.split(None, 2)[1])
        if status == 200:
            self.done_at.append(time.perf_counter())
        else:
            assert status == 429, answer
            self.refused_ms.append((time.perf_counter() - began) * 1e3)
        self.idle.append((reader, writer))

    def close(self) -> None:
        """Close what is open."""
        for _, writer in self.idle:
            writer.close()


async def find_capacity(target: Target, body: bytes, seconds: float) -> float:
    """Answers per second for as many clients as sequences run together."""
    load = Load()
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await load.ask(target, body)

    await asyncio.gather(*(client() for _ in range(MAX_NUM_SEQS)))
    load.close()
    began = end - seconds / 2  # by then it runs evenly
    return sum(began <= at < end for at in load.done_at) / (seconds / 2)


async def flood(target: Target, body: bytes, *, rate: float, seconds: float) -> tuple[float, Load]:
    """Answers per second when `rate` requests arrive in one, evenly."""
    load = Load()
    began = time.perf_counter()
    tasks = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(began + number / rate - time.perf_counter())
        tasks.append(asyncio.create_task(load.ask(target, body)))
    end = time.perf_counter()
    await asyncio.gather(*tasks)
    load.close()
    half = began + seconds / 2
    return sum(half <= at < end for at in load.done_at) / (end - half), load


def measure_overload(target: Target, seconds: float, num_tokens: int) -> dict[str, Any]:
    """Loads about what can be sustained, and three times as much."""
    body = json.dumps({"token_ids": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}).encode()
    capacity = asyncio.run(find_capacity(target, body, seconds))
    assert capacity > 0, "no request ended in the second half of the time; the machine is busy, or --seconds too few"
    loads = [asyncio.run(flood(target, body, rate=share * capacity, seconds=seconds))[0] for share in SUSTAINABLE]
    peak = max(loads)
    goodput, load = asyncio.run(flood(target, body, rate=OVERLOAD * capacity, seconds=seconds))
    assert load.refused_ms, "nothing was refused: the load is not what was sustained before"
    return {
        "capacity_per_s": capacity,
        "peak_per_s": peak,
        "peaks_per_s": dict(zip(map(str, SUSTAINABLE), loads, strict=True)),
        "goodput_by_capacity": goodput / capacity,
        "offered_per_s": load.num_sent / seconds,
        "goodput_per_s": goodput,
        "goodput_ratio": goodput / peak,
        "refused": len(load.refused_ms),
        "refusal_median_ms": statistics.median(load.refused_ms),
        "refusal_p99_ms": percentile(load.refused_ms, 0.99),
        "refusal_max_ms": max(load.refused_ms),
    }


def measure_idle(target: Target, seconds: float) -> dict[str, float]:
    """Share of a core."""
    before = target.all_seconds()
    time.sleep(seconds)
    return {"seconds": seconds, "core_ratio": (target.all_seconds() - before) / seconds}


def judge(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each figure that has a target, beside it."""
    figures = {
        "one_token_median_ms": result["one_token"]["median_ms"],
        "one_token_p99_by_median": result["one_token"]["p99_by_median"],
        "streamed_token_ms": result["streamed_token"]["loop_ms"],
        "goodput_ratio": result["overload"]["goodput_ratio"],
        "refusal_p99_ms": result["overload"]["refusal_p99_ms"],
        "idle_core_ratio": result["idle"]["core_ratio"],
    }
    return {
        name: {"value": value, "target": TARGETS[name], "met": (value >= TARGETS[name]) == (name == "goodput_ratio")}
        for name, value in figures.items()
    }


def measure(seconds: float) -> dict[str, Any]:
    """All figures of one server."""
    key = secrets.token_hex(32)
    limits = ["--max-num-seqs", str(MAX_NUM_SEQS), "--max-queue", str(MAX_QUEUE)]
    with ready(*limits, environment={"PENNYWEIGHT_API_KEYS": key}) as (process, client):
        assert client.base_url.port is not None
        target = Target(process, client.base_url.host, client.base_url.port, key)
        return {
            "machine": machine(),
            "one_token": measure_one_token(target, num_requests=int(100 * seconds)),
            "streamed_token": measure_streamed_token(target, num_rounds=max(2, int(seconds)), num_tokens=200),
            "overload": measure_overload(target, seconds=seconds, num_tokens=64),
            "idle": measure_idle(target, seconds=2 * seconds),
        }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each part, about")
    arguments = parser.parse_args()
    result = measure(arguments.seconds)
    result["figures"] = judge(result)
    text = json.dumps(result, indent=2)
    arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
