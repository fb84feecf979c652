"""Keys and values in int8 beside those in the dtype of the activations: memory, step time, and what is lost.

    python -m tests.benchmarks.bench_kv_cache --output FILE.json [--text FILE.txt]

The KL divergence is that of the demo model's next-token distributions on a text, in windows of its whole
context. Steps decode 16 sequences of about 1000 tokens whose blocks are scattered; the formats take turns
after each step, and the ratio of their times is the median of the ratios of such pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from array import array
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from service.demo import model_folder
from service.demo.train import unwrap
from service.engine.attention import install
from service.engine.batch import Work
from service.engine.blocks import BLOCK_SIZE, KVBlocks
from service.engine.config import KVFormat
from service.engine.runner import Runner
from service.engine.sequence import SamplingParams, Sequence
from tests.benchmarks.bench_engine import machine, make_stock
from tests.engine.kl import divergences

EXCERPT = Path(__file__).parents[1] / "data" / "the_lost_world.txt"
FORMATS: tuple[KVFormat, ...] = ("auto", "int8")
KV_MEMORY_BYTES = 1 << 30
NUM_SEQUENCES = 16
CONTEXT = 1024
NUM_WARM_STEPS = 2


def lost(dtype: torch.dtype, text: str, max_windows: int) -> dict[str, float]:
    """Nats between plain and int8 keys and values over the windows of a text, and the number of its tokens."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype)
    install(model)
    ids = torch.tensor(AutoTokenizer.from_pretrained(model_folder()).encode(unwrap(text)))
    kv = KVBlocks()
    kv.set_format("int8")
    starts = range(0, min(len(ids), max_windows * CONTEXT), CONTEXT)
    found = torch.cat([divergences(model, ids[start : start + CONTEXT], kv) for start in starts])
    return {"mean": float(found.mean()), "p99": float(found.quantile(0.99)), "tokens": len(found)}


class Decoder:
    """A runner whose blocks hold random keys and values, and one decode step of `NUM_SEQUENCES` on them."""

    def __init__(self, model: nn.Module, kv_cache: KVFormat) -> None:
        self._runner = Runner(model)
        table = torch.randperm(NUM_SEQUENCES * CONTEXT // BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
        tables = table.view(NUM_SEQUENCES, -1).tolist()
        self._works = [_decode(table, CONTEXT - 1 - i) for i, table in enumerate(tables)]
        self._runner.forward([_decode([0], 0)])  # the runner learns the layers
        shapes = {"max_num_seqs": NUM_SEQUENCES, "max_model_len": CONTEXT}
        self.num_blocks = self._runner.allocate(KV_MEMORY_BYTES, **shapes, kv_cache=kv_cache).num_blocks
        self.bytes_per_token = self._runner.kv.bytes_per_token
        self._fill()

    @torch.inference_mode()
    def step(self) -> float:
        """Milliseconds of a forward."""
        started_at = time.perf_counter()
        self._runner.forward(self._works)
        return 1e3 * (time.perf_counter() - started_at)

    @torch.inference_mode()
    def _fill(self) -> None:
        kv = self._runner.kv
        slots = torch.arange(NUM_SEQUENCES * CONTEXT)
        for layer_idx in range(kv.num_layers):
            rows = [torch.randn(len(slots), *part.shape[1:]).to(part) for part in kv.view(layer_idx, 0, 1)]
            kv.append(layer_idx, rows[0], rows[1], slots)


def timed(model: nn.Module, num_steps: int) -> dict[str, Any]:
    """Bytes, blocks and milliseconds of a step of each format, and int8 by auto."""
    decoders = {kv_cache: Decoder(model, kv_cache) for kv_cache in FORMATS}
    times: dict[str, list[float]] = {kv_cache: [] for kv_cache in FORMATS}
    for i in range(NUM_WARM_STEPS + num_steps):
        for kv_cache, decoder in decoders.items():
            milliseconds = decoder.step()
            if i >= NUM_WARM_STEPS:
                times[kv_cache].append(milliseconds)
    auto, int8 = (decoders[kv_cache] for kv_cache in FORMATS)
    return {
        "bytes_per_token": {kv_cache: decoder.bytes_per_token for kv_cache, decoder in decoders.items()},
        "blocks": {kv_cache: decoder.num_blocks for kv_cache, decoder in decoders.items()},
        "step_ms": {kv_cache: _quantiles(steps) for kv_cache, steps in times.items()},
        "ratios": {
            "bytes per token": int8.bytes_per_token / auto.bytes_per_token,
            "blocks": int8.num_blocks / auto.num_blocks,
            "step time": statistics.median(b / a for a, b in zip(times["auto"], times["int8"], strict=True)),
        },
    }


def _decode(block_table: list[int], position: int) -> Work:
    sequence = Sequence(
        request_id=str(block_table[0]),
        token_ids=[1] * (position + 1),
        num_prompt_tokens=1,
        params=SamplingParams(max_tokens=position + 1, temperature=0),
        submitted_at=0.0,
        block_table=array("q", block_table),
    )
    return Work(sequence, position, 1)


def _quantiles(milliseconds: Seq[float]) -> dict[str, float]:
    deciles = statistics.quantiles(milliseconds, n=10)
    return {"median": statistics.median(milliseconds), "p10": deciles[0], "p90": deciles[-1]}


def _demo() -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16)
    return model


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--text", type=Path, default=EXCERPT, help="text for the KL divergence; default: an excerpt")
    parser.add_argument("--windows", type=int, default=24, help="windows of 1024 tokens of the text at most")
    parser.add_argument("--steps", type=int, default=40, help="steps of each format on each model, at least 2")
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    result = {
        "machine": machine(),
        "text": arguments.text.name,
        "kl_nats": {str(dtype): lost(dtype, text, arguments.windows) for dtype in (torch.float32, torch.bfloat16)},
        "models": {
            "demo": timed(_demo(), arguments.steps),
            "shape of SmolLM2-135M": timed(make_stock(), arguments.steps),
        },
    }
    written = json.dumps(result, indent=2)
    arguments.output.write_text(written + "\n")
    print(written)


if __name__ == "__main__":
    main()
