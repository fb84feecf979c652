"""The memory that a load of experts takes beyond its result, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

pytestmark = pytest.mark.e2e

NUM_LAYERS, NUM_EXPERTS, HIDDEN, INNER = 2, 32, 1024, 768
MERGED_BYTES = NUM_EXPERTS * 2 * INNER * HIDDEN * 2
"""Gate and up of all experts of one layer, which are merged into one tensor unless they are quantized."""
OTHER_BYTES = 48 << 20
"""Code, threads and the heap; measured 11 MB for `none`, 25 MB with the encoding threads."""

SCRIPT = """
import json, sys
from service.loading.loader import load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
options = LoadOptions(model=sys.argv[1], recipe=parse_recipe(sys.argv[2]), device="cpu", dtype="bfloat16")
loaded = load_model(options, LoadProgress())
report, plan = loaded.report, loaded.plan
peak = report.peak_bytes["host"]
print(json.dumps([peak - report.resident_before_bytes - report.weight_bytes.total, plan.peak_bytes - peak]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=NUM_EXPERTS,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)  # the fastest weights to make; their values do not matter here
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("recipe", "most_bytes"), [("none", MERGED_BYTES + OTHER_BYTES), ("w8a16", OTHER_BYTES), ("w4a16", OTHER_BYTES)]
)
def test_a_load_takes_at_most_one_merged_tensor_more_than_its_result_and_less_than_planned(
    recipe: str, most_bytes: int, folder: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(folder), recipe]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    beside_result, below_plan = json.loads(result.stdout.splitlines()[-1])
    assert beside_result <= most_bytes
    assert below_plan >= 0
