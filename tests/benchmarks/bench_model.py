"""Whole models in the engine: unquantized beside quantized, alternated in one run.

    python -m tests.benchmarks.bench_model --output FILE.json [--shapes smollm2-135m,tinyllama-1.1b]

Per shape (random weights, bfloat16) and recipe: decode steps of 1 and of 16 sequences, and the prefill of one prompt
of 512 tokens. Ratios are medians of the ratios within a round, in which every recipe has its turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from service.engine.engine import Engine
from service.engine.sequence import SamplingParams
from service.reports.hardware import describe_machine
from tests.benchmarks.bench_engine import NUM_PROMPT_TOKENS, NUM_SEQUENCES, EngineUnderTest, quantized

RECIPES: Final = ("none", "w8a16", "w4a16-g64")
NUM_PREFILL_TOKENS: Final = 512
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
"""Public configs of HuggingFaceTB/SmolLM2-135M and TinyLlama/TinyLlama-1.1B."""


def make_model(shape: str) -> LlamaForCausalLM:
    """A Llama of this shape with random weights, made in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, **SHAPES[shape]))
    finally:
        torch.set_default_dtype(before)
    nn.Module.eval(model)
    return model


class Measured(EngineUnderTest):
    """An engine that also times the prefill of one prompt."""

    engine: Engine

    def prefill(self, prompt: list[int]) -> float:
        """Milliseconds from submission to the first token, which is the last."""
        self._idle.clear()
        self._num_open = 1
        started_at = time.perf_counter()
        self.engine.submit("prefill", prompt, SamplingParams(max_tokens=1, temperature=0))
        if not self._idle.wait(300):
            raise TimeoutError("the engine did not finish")
        return 1e3 * (time.perf_counter() - started_at)


def measure(shape: str, recipes: Sequence[str], num_rounds: int) -> dict[str, Any]:
    """Medians of milliseconds and ratios to `none`, after one round that is not counted."""
    stock = make_model(shape)
    vocab_size = int(stock.config.vocab_size)
    models = {recipe: stock if recipe == "none" else quantized(stock, recipe) for recipe in recipes}
    engines = {recipe: Measured(model, vocab_size) for recipe, model in models.items()}
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocab_size, (max(NUM_SEQUENCES), NUM_PROMPT_TOKENS), generator=generator).tolist()
    long_prompt = torch.randint(vocab_size, (NUM_PREFILL_TOKENS,), generator=generator).tolist()
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(num_rounds + 1):
        found: dict[str, dict[str, float]] = {}
        for recipe, engine in engines.items():
            found[recipe] = {
                f"decode_{count}_ms": statistics.median(engine.run(prompts[:count])) for count in NUM_SEQUENCES
            }
            found[recipe][f"prefill_{NUM_PREFILL_TOKENS}_ms"] = engine.prefill(long_prompt)
        rounds.append(found)
    for engine in engines.values():
        engine.engine.stop()
    del rounds[0]
    return {"shape": shape, "rounds": num_rounds, "rows": [_row(recipe, rounds) for recipe in recipes]}


def _row(recipe: str, rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    keys = rounds[0][recipe]
    times = {key: statistics.median(found[recipe][key] for found in rounds) for key in keys}
    speedups = {key: statistics.median(found["none"][key] / found[recipe][key] for found in rounds) for key in keys}
    return {"recipe": recipe, **times, "speedup": {key.removesuffix("_ms"): value for key, value in speedups.items()}}


def main() -> None:
    """Run the comparison, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5, help="how often the recipes take turns")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which shapes, separated by commas")
    arguments = parser.parse_args()
    shapes = [measure(shape, RECIPES, arguments.rounds) for shape in arguments.shapes.split(",")]
    machine = describe_machine(torch.get_num_threads())
    text = json.dumps({"machine": machine, "shapes": shapes}, indent=2)
    arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
