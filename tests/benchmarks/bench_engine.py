"""Engine steps beside the stock forward of transformers, alternated in one run.

    python -m tests.benchmarks.bench_engine --output FILE.json

A stock step is one greedy step of a hand-written loop: `forward` with a `DynamicCache`, then argmax.
An engine step is what a client waits for: from one finished step to the next on the engine thread,
so scheduling, sampling, commit and delivery count. Both run the same weights on the same number of threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from service.engine.attention import install
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.sequence import FinishReason, SamplingParams, SequenceEvent, SequenceTimings
from service.engine.stats import StepStats
from service.loading.loader import load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe

NUM_PROMPT_TOKENS = 64
NUM_SEQUENCES = (1, 16)
NUM_STEPS = 24  # decode steps of one block, before the next path has its turn
NUM_WARM_STEPS = 4  # first steps of a block, left out: caches hold the other path's data
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds per decode step of one path; tokens per second at the median."""

    path: str
    scheme: str
    num_sequences: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    num_steps: int
    tokens_per_s: float


@dataclass(slots=True)
class StepClock:
    """Observer that notes when each step ended, and how many sequences it decoded (0 if it had prompt tokens)."""

    steps: list[tuple[float, int]] = field(default_factory=list)

    def on_step(self, stats: StepStats) -> None:
        self.steps.append((time.perf_counter(), stats.num_sequences if stats.kind == "decode" else 0))

    def on_step_error(self) -> None:
        raise RuntimeError("a step failed")

    def on_nonfinite(self) -> None:
        raise RuntimeError("logits are not finite")

    def on_finished(self, reason: FinishReason, timings: SequenceTimings) -> None:
        assert reason is FinishReason.LENGTH, (reason, timings)


class EngineUnderTest:
    """An engine that runs blocks of equal requests and reports milliseconds per decode step."""

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        self.model = model
        self._clock = StepClock()
        self._num_open = 0
        self._idle = threading.Event()
        config = EngineConfig(
            max_num_seqs=max(NUM_SEQUENCES),
            max_num_batched_tokens=max(NUM_SEQUENCES) * NUM_PROMPT_TOKENS,
            max_model_len=1024,
            kv_memory_bytes=1 << 28,
            vocab_size=vocab_size,
            num_threads=torch.get_num_threads(),
            prefix_cache=False,  # each round has the same prompts
        )
        self.engine = Engine(model, config, observer=self._clock, deliver=self._deliver)
        self.engine.start()

    def run(self, prompts: Sequence[list[int]]) -> list[float]:
        """Milliseconds of each decode step that held all prompts."""
        install(self.model)
        self._clock.steps.clear()
        self._idle.clear()
        self._num_open = len(prompts)
        params = SamplingParams(max_tokens=NUM_STEPS + 1, temperature=0)
        for i, prompt in enumerate(prompts):
            self.engine.submit(str(i), prompt, params)
        if not self._idle.wait(TIMEOUT_S):
            raise TimeoutError("the engine did not finish")
        steps = self._clock.steps
        both_full = [(a, b) for a, b in itertools.pairwise(steps) if a[1] == b[1] == len(prompts)]
        return [1e3 * (b[0] - a[0]) for a, b in both_full][NUM_WARM_STEPS:]

    def _deliver(self, events: Sequence[SequenceEvent]) -> None:
        self._num_open -= sum(event.finish_reason is not None for event in events)
        if self._num_open == 0:
            self._idle.set()


@torch.inference_mode()
def run_stock(model: PreTrainedModel, prompt: list[int]) -> list[float]:
    """Milliseconds of each greedy step of the stock forward, one sequence."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    token = model(torch.tensor([prompt]), past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    times = []
    for _ in range(NUM_STEPS):
        started_at = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        token.item()
        times.append(1e3 * (time.perf_counter() - started_at))
    return times[NUM_WARM_STEPS:]


def compare(stock: PreTrainedModel, served: Mapping[str, nn.Module], num_rounds: int) -> list[Row]:
    """Time the stock model at one sequence and the engine on each served model (by scheme) at 1 and 16.

    A served model may be the stock model itself; its attention is then exchanged between blocks.
    """
    vocab_size = int(stock.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocab_size, (max(NUM_SEQUENCES), NUM_PROMPT_TOKENS), generator=generator).tolist()
    engines = {scheme: EngineUnderTest(model, vocab_size) for scheme, model in served.items()}
    times: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(num_rounds):
        times.setdefault(("stock", "none", 1), []).extend(run_stock(stock, prompts[0]))
        for scheme, engine in engines.items():
            for count in NUM_SEQUENCES:
                times.setdefault(("engine", scheme, count), []).extend(engine.run(prompts[:count]))
    for engine in engines.values():
        engine.engine.stop()
    return [_row(*key, milliseconds) for key, milliseconds in times.items()]


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Engine against stock at one sequence: time per step at 1, tokens per second at 16."""
    stock = next(row for row in rows if row.path == "stock")
    found = {}
    for row in rows:
        if row.path == "engine" and row.num_sequences == 1:
            found[f"{row.scheme}: step time at 1 / stock"] = row.median_ms / stock.median_ms
        elif row.path == "engine":
            found[f"{row.scheme}: tokens/s at {row.num_sequences} / stock"] = row.tokens_per_s / stock.tokens_per_s
    return found


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE))
        cpu = f"{fields.get('model name', cpu)} family {fields.get('cpu family')} model {fields.get('model')}"
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def make_stock() -> PreTrainedModel:
    """A Llama of the shape of SmolLM2-135M with random weights, bf16."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)
    nn.Module.eval(model)
    return model


def quantized(stock: PreTrainedModel, recipe: str) -> nn.Module:
    """The stock weights, written to disk and loaded as a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        options = LoadOptions(model=folder, recipe=parse_recipe(recipe), device="cpu", dtype="bfloat16")
        return load_model(options, LoadProgress()).model


def _row(path: str, scheme: str, num_sequences: int, milliseconds: list[float]) -> Row:
    deciles = statistics.quantiles(milliseconds, n=10)
    median = statistics.median(milliseconds)
    return Row(
        path, scheme, num_sequences, median, deciles[0], deciles[-1], len(milliseconds), 1e3 * num_sequences / median
    )


def main() -> None:
    """Run the comparison, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=8, help="how often the paths take turns")
    parser.add_argument("--quantize", default="w8a16", help="recipe to serve beside none")
    arguments = parser.parse_args()
    stock = make_stock()
    served = {"none": stock, arguments.quantize: quantized(stock, arguments.quantize)}
    rows = compare(stock, served, arguments.rounds)
    result = {"machine": machine(), "rows": [asdict(row) for row in rows], "ratios": ratios(rows)}
    text = json.dumps(result, indent=2)
    arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
