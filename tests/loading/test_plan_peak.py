"""The peak of loads in processes of their own, beside what was planned for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

from tests.floors import ROOT
from tests.sparse import write_sparse_checkpoint

_SCRIPT = """
import json, sys
from service.loading.loader import load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
options = LoadOptions(model=sys.argv[1], recipe=parse_recipe(sys.argv[2]), device="cpu", dtype="bfloat16")
loaded = load_model(options, LoadProgress())
print(json.dumps([loaded.report.peak_bytes["host"], loaded.plan.peak_bytes]))
"""


def measured(folder: Path, recipe: str) -> tuple[int, int]:
    """Peak of a load in a process of its own, and what was planned for it."""
    command = [sys.executable, "-c", _SCRIPT, str(folder), recipe]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    peak, planned = json.loads(result.stdout.splitlines()[-1])
    return peak, planned


PEAK_CONFIGS = {
    "tied": LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=64000,
        tie_word_embeddings=True,
    ),
    "1 GB embedding": LlamaConfig(
        hidden_size=2048, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=8, vocab_size=256000
    ),
    "1 GB embedding, tied": LlamaConfig(
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=8,
        vocab_size=256000,
        tie_word_embeddings=True,
    ),
    "experts": Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=1024,
        moe_intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=32,
    ),
    "stored the other way round": GPT2Config(vocab_size=300, n_embd=2048, n_inner=60000, n_layer=2, n_head=8),
}


@pytest.mark.e2e
def test_a_load_of_a_tied_model_never_needs_more_than_was_planned(tmp_path: Path) -> None:
    peak, planned = measured(write_sparse_checkpoint(tmp_path / "model", PEAK_CONFIGS["tied"]), "w8a16")
    assert peak <= planned


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16 in the file", "float32 in the file"])
@pytest.mark.parametrize("recipe", ["none", "w8a16", "w4a16"])
@pytest.mark.parametrize("name", PEAK_CONFIGS)
def test_a_load_never_needs_more_than_was_planned(name: str, recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    peak, planned = measured(write_sparse_checkpoint(tmp_path / "model", PEAK_CONFIGS[name], dtype=dtype), recipe)
    assert peak <= planned


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["none", "w8a16"])
def test_a_load_from_shards_never_needs_more_than_was_planned(recipe: str, tmp_path: Path) -> None:
    folder = write_sparse_checkpoint(tmp_path / "model", PEAK_CONFIGS["1 GB embedding"], num_shards=3)
    peak, planned = measured(folder, recipe)
    assert peak <= planned


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["none", "w8a16"])
@pytest.mark.parametrize("is_turned", [False, True], ids=["in order", "linears not in order"])
def test_a_load_from_bin_files_never_needs_more_than_was_planned(is_turned: bool, recipe: str, tmp_path: Path) -> None:
    folder = write_sparse_checkpoint(tmp_path / "model", PEAK_CONFIGS["tied"])
    tensors = load_file(folder / "model.safetensors")
    if is_turned:
        tensors = {name: tensor.mT.contiguous().mT if "_proj" in name else tensor for name, tensor in tensors.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    peak, planned = measured(folder, recipe)
    assert peak <= planned
