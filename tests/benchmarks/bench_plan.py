"""How long a plan takes once everything is imported: config and headers only, of models that nobody has to download.

    python -m tests.benchmarks.bench_plan --output FILE.json

It takes some minutes. Checkpoints are files with holes: real headers, no weights; experts are stacked in them. Each
figure is from processes of its own: `first_s` is their first plan, in which transformers still imports the model's
class, `again_s` the next one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from service.demo import model_folder
from service.loading.planning import LoadOptions, plan_model
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from tests.benchmarks.bench_engine import machine
from tests.floors import ROOT
from tests.sparse import write_sparse_checkpoint

TARGET_S = 1.0
NUM_SHARDS = 4
RECIPES = ("w8a16", "w4a16,*.down_proj=w8a16")
SHAPES: dict[str, PreTrainedConfig] = {
    "llama_1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "llama_8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=128256
    ),
    "qwen3_moe_30b": Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
        vocab_size=151936,
    ),
}


def plan_twice(folder: str, recipe: str) -> dict[str, float]:
    """Seconds of two plans in this process."""
    options = LoadOptions(model=folder, recipe=parse_recipe(recipe), device="cpu", dtype="bfloat16")
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        plan_model(options, LoadProgress())
        seconds.append(time.perf_counter() - started)
    return {"first_s": seconds[0], "again_s": seconds[1]}


def measure(folder: Path, recipe: str, num_rounds: int) -> dict[str, float]:
    """Medians over processes."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_plan", "--plan", str(folder), recipe]
    runs = [
        json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(num_rounds)
    ]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plan", nargs=2, metavar=("FOLDER", "RECIPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        print(json.dumps(plan_twice(*arguments.plan)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"demo": model_folder()} | {
            name: write_sparse_checkpoint(Path(temporary) / name, config, num_shards=NUM_SHARDS)
            for name, config in SHAPES.items()
        }
        for name, folder in folders.items():
            for recipe in RECIPES:
                rows.append({"model": name, "recipe": recipe} | measure(folder, recipe, arguments.rounds))
                print(rows[-1], file=sys.stderr)
    result = {"machine": machine(), "target_s": TARGET_S, "plans": rows}
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
