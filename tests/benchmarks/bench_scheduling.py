"""What the engine does around the forward: bookkeeping, prompts beside decodes, prompts that begin alike.

    python -m tests.benchmarks.bench_scheduling --output FILE.json

Bookkeeping is the CPU time that the engine thread spends on a decode step outside the model's own forward: schedule,
inputs and block tables, greedy choice, commit, metrics, delivery; of a tiny model, whose forward disturbs little.
The others use the shape of SmolLM2-135M as w8a16. A long prompt comes while 8 sequences decode, then alone, in each
round. A prompt whose first tokens were there before is held against one with new ones, in pairs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.sequence import SamplingParams, SequenceEvent
from service.engine.stats import StepStats
from service.loading.progress import LoadProgress
from service.metrics import Metrics
from service.reports.hardware import describe_machine
from tests.benchmarks.bench_engine import quantized
from tests.benchmarks.bench_model import SHAPES
from tests.models import CONTEXT, build_model

RECIPE = "w8a16"
NUM_BOOKKEPT = (16, 128)
"""Sequences of the steps whose bookkeeping is measured."""
NUM_STREAMS, NUM_STREAM_TOKENS = 8, 1500
"""Sequences that decode, and the tokens that they may have; they are ended sooner."""
LONG_PROMPT, STREAM_PROMPT = 2048, 64
PREFIX, TAIL = 1000, 16
MAX_MODEL_LEN = 4096
STEP_BUDGET_MS = 50
NUM_QUIET_TOKENS = 24
"""Of each stream, before the long prompt comes: what its median interval is taken from."""
NUM_WARM_STEPS = 8
TIMEOUT_S = 300.0


class Observed(Metrics):
    """The service's own metrics, which also note the CPU time of each decode step outside the forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(LoadProgress(), model="m", scheme="none", device="cpu")
        self.num_decoding = 0
        self.forward_s = 0.0
        self._began = 0.0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def on_step(self, stats: StepStats) -> None:
        super().on_step(stats)
        self.num_decoding = stats.num_sequences if stats.kind == "decode" else 0

    def _begin(self, *_: object) -> None:
        self._began = time.thread_time()

    def _end(self, *_: object) -> None:
        self.forward_s += time.thread_time() - self._began


class TimedEngine(Engine):
    """Notes the CPU seconds of each decode step outside the forward, with its number of sequences."""

    def __init__(self, model: nn.Module, config: EngineConfig) -> None:
        self.observer = Observed(model)
        self.arrivals = Arrivals()
        self.outside: list[tuple[int, float]] = []
        super().__init__(model, config, observer=self.observer, deliver=self.arrivals.deliver)

    def step(self) -> None:
        self.observer.num_decoding, self.observer.forward_s = 0, 0.0
        began = time.thread_time()
        super().step()
        seconds = time.thread_time() - began - self.observer.forward_s
        self.outside.append((self.observer.num_decoding, seconds))


@dataclass(slots=True)
class Arrivals:
    """When the tokens of each sequence came."""

    times: dict[str, list[float]] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def deliver(self, events: Sequence[SequenceEvent]) -> None:
        now = time.perf_counter()
        with self._changed:
            for event in events:
                if event.token_ids:
                    self.times.setdefault(event.request_id, []).append(now)
                if event.finish_reason is not None:
                    self._ended.add(event.request_id)
            self._changed.notify_all()

    def wait_for_tokens(self, request_id: str, count: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.times.get(request_id, ())) >= count, TIMEOUT_S):
                raise TimeoutError(f"{request_id} has no {count} tokens")

    def wait_for_end(self, request_id: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: request_id in self._ended, TIMEOUT_S):
                raise TimeoutError(f"{request_id} has not ended")


class Prompts:
    """Random prompts, no two alike."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, num_tokens: int) -> list[int]:
        ids: list[int] = torch.randint(10, self._vocab_size, (num_tokens,), generator=self._generator).tolist()
        return ids


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


def measure_bookkeeping(num_sequences: int) -> dict[str, Any]:
    """Milliseconds per decode step outside the forward."""
    model = build_model("llama", num_hidden_layers=1)
    vocab_size = int(model.config.vocab_size)
    config = EngineConfig(
        max_num_seqs=num_sequences,
        max_num_batched_tokens=4096,
        max_model_len=CONTEXT,
        kv_memory_bytes=1 << 26,
        vocab_size=vocab_size,
        num_threads=1,
    )
    engine, prompts = TimedEngine(model, config), Prompts(vocab_size)
    engine.start()
    for number in range(num_sequences):
        engine.submit(str(number), prompts.draw(STREAM_PROMPT), greedy(CONTEXT - STREAM_PROMPT))
    for number in range(num_sequences):
        engine.arrivals.wait_for_end(str(number))
    engine.stop()
    times = [1e3 * seconds for count, seconds in engine.outside if count == num_sequences][NUM_WARM_STEPS:]
    deciles = statistics.quantiles(times, n=10)
    return {
        "sequences": num_sequences,
        "median_ms": statistics.median(times),
        "p10_ms": deciles[0],
        "p90_ms": deciles[-1],
        "steps": len(times),
    }


def make_engine(num_threads: int) -> TimedEngine:
    """An engine with the shape of SmolLM2-135M and a context for long prompts.

    The model is made on a thread that ends, as in the service: while another thread has its own pool, there are more
    threads of OpenMP than cores, and libgomp lets them sleep between two products, which makes a step half as long
    again.
    """
    with ThreadPoolExecutor(1) as load_thread:
        model = load_thread.submit(_make_model).result()
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        kv_memory_bytes=1 << 29,
        vocab_size=int(SHAPES["smollm2-135m"]["vocab_size"]),
        num_threads=num_threads,
        step_budget_ms=STEP_BUDGET_MS,
    )
    engine = TimedEngine(model, config)
    engine.start()
    return engine


def _make_model() -> nn.Module:
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(max_position_embeddings=MAX_MODEL_LEN, **SHAPES["smollm2-135m"]))
    nn.Module.to(stock, torch.bfloat16)
    nn.Module.eval(stock)
    return quantized(stock, RECIPE)


def first_token_s(engine: TimedEngine, name: str, prompt: list[int]) -> float:
    """Seconds from submission to the first token, which is the last."""
    began = time.perf_counter()
    engine.submit(name, prompt, greedy(1))
    engine.arrivals.wait_for_tokens(name, 1)
    return engine.arrivals.times[name][0] - began


def measure_fairness(engine: TimedEngine, prompts: Prompts, num_rounds: int) -> dict[str, Any]:
    """Intervals between tokens of 8 streams while a long prompt is read, and how long that one takes."""
    quiet: list[float] = []
    beside: list[float] = []
    rounds = []
    first_token_s(engine, "warm", prompts.draw(LONG_PROMPT))
    for number in range(num_rounds):
        names = [f"stream {number} {i}" for i in range(NUM_STREAMS)]
        for name in names:
            engine.submit(name, prompts.draw(STREAM_PROMPT), greedy(NUM_STREAM_TOKENS))
        for name in names:
            engine.arrivals.wait_for_tokens(name, NUM_QUIET_TOKENS + 1)
        began = time.perf_counter()
        shared_s = first_token_s(engine, f"long {number}", prompts.draw(LONG_PROMPT))
        for name in names:
            engine.abort(name)
            engine.arrivals.wait_for_end(name)
            times = engine.arrivals.times[name]
            pairs = list(itertools.pairwise(times))
            quiet += [1e3 * (b - a) for a, b in pairs if b < began]
            beside += [1e3 * (b - a) for a, b in pairs if b > began and a < began + shared_s]
        alone_s = first_token_s(engine, f"alone {number}", prompts.draw(LONG_PROMPT))
        rounds.append({"first_token_s": shared_s, "alone_s": alone_s})
    return {
        "streams": NUM_STREAMS,
        "prompt_tokens": LONG_PROMPT,
        "step_budget_ms": STEP_BUDGET_MS,
        "quiet_median_ms": statistics.median(quiet),
        "inter_token_ms": {"p50": statistics.median(beside), "p99": statistics.quantiles(beside, n=100)[-1]},
        "first_token_ratio": statistics.median(found["first_token_s"] / found["alone_s"] for found in rounds),
        "rounds": rounds,
    }


def measure_prefix(engine: TimedEngine, prompts: Prompts, num_rounds: int) -> dict[str, Any]:
    """How much sooner a prompt has its first token whose beginning was there before."""
    rounds = []
    for number in range(num_rounds):
        prefix = prompts.draw(PREFIX)
        new_s = first_token_s(engine, f"new {number}", prefix + prompts.draw(TAIL))
        repeated_s = first_token_s(engine, f"repeated {number}", prefix + prompts.draw(TAIL))
        rounds.append({"new_s": new_s, "repeated_s": repeated_s})
    ratio = statistics.median(found["new_s"] / found["repeated_s"] for found in rounds)
    return {"prefix_tokens": PREFIX, "tail_tokens": TAIL, "speedup": ratio, "rounds": rounds}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=6, help="how often each is measured")
    arguments = parser.parse_args()
    num_threads = torch.get_num_threads()  # read before an engine with one thread sets it for threads that come later
    with ThreadPoolExecutor(1) as thread:  # as below
        bookkeeping = list(thread.map(measure_bookkeeping, NUM_BOOKKEPT))
    engine = make_engine(num_threads)
    prompts = Prompts(SHAPES["smollm2-135m"]["vocab_size"])
    result = {
        "machine": describe_machine(num_threads),
        "bookkeeping": bookkeeping,
        "fairness": measure_fairness(engine, prompts, arguments.rounds),
        "prefix": measure_prefix(engine, prompts, arguments.rounds),
    }
    engine.stop()
    text = json.dumps(result, indent=1)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
