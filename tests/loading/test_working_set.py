"""What a load holds beside its result, as it is planned: a tensor, pieces of one, or the experts of a layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from service.loading.config import read_model
from service.loading.forecast import Skeleton
from service.loading.plan import SCRATCH_BYTES, LoadPlan
from service.loading.planning import LoadOptions, plan_model
from service.loading.progress import LoadProgress
from service.loading.source import ModelSource
from service.loading.tensors import PIECE_BYTES
from service.numerics.recipe import parse_recipe
from tests.families.recipes import build
from tests.models import write_checkpoint
from tests.sparse import write_sparse_checkpoint


def plan(folder: Path, recipe: str, dtype: str = "float32") -> LoadPlan:
    options = LoadOptions(model=str(folder), recipe=parse_recipe(recipe), device="cpu", dtype=dtype)
    return plan_model(options, LoadProgress())


def large_working_set(folder: Path, config: PreTrainedConfig, recipe: str) -> tuple[str, int]:
    working_set = plan(write_sparse_checkpoint(folder, config), recipe, "bfloat16").working_set
    return working_set.source, working_set.bytes - SCRATCH_BYTES


def test_a_large_tensor_counts_with_its_pieces_only_if_it_is_read_in_pieces(tmp_path: Path) -> None:
    llama = LlamaConfig(
        vocab_size=140_000, hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    for recipe in ("none", "w8a16"):
        source, num_bytes = large_working_set(tmp_path / "llama", llama, recipe)
        assert source in {f"two runs of rows of {name}.weight" for name in ("lm_head", "model.embed_tokens")}
        assert num_bytes == 2 * PIECE_BYTES
    # GPT-2 stores its linears the other way round: as they are, or whole.
    gpt2 = GPT2Config(vocab_size=64, n_embd=1024, n_inner=140_000, n_layer=1, n_head=4)
    turned = "transformer.h.0.mlp.c_{}.weight"
    source, num_bytes = large_working_set(tmp_path / "gpt2", gpt2, "w8a16")
    assert source in {f"the tensor {turned.format(name)}" for name in ("fc", "proj")}
    assert num_bytes == 2 * 1024 * 140_000
    source, num_bytes = large_working_set(tmp_path / "gpt2", gpt2, "none")
    assert source in {f"two runs of rows of {turned.format(name)}" for name in ("fc", "proj")}
    assert num_bytes == 2 * PIECE_BYTES


def test_only_tensors_that_become_one_weight_as_they_are_count_as_read_in_pieces(tmp_path: Path) -> None:
    build("hrm_text").save_pretrained(tmp_path)  # transformers splits its checkpoint's `gate_up_proj`
    source = ModelSource(folder=tmp_path, name="m", revision="local")
    skeleton = Skeleton(read_model(source, trust_remote_code=False), torch.float32)
    in_file = load_file(tmp_path / "model.safetensors").keys()
    split = {name for name in in_file if "gate_up_proj" in name or "gqkv_proj" in name}
    assert split
    assert skeleton.reads_in_pieces([*in_file, "no.such.weight"], parse_recipe("w8a16")) == in_file - split


def test_elements_out_of_order_count_twice(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.save(tensors | {name: tensors[name].t().contiguous().t()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    working_set = plan(folder, "w8a16").working_set
    others = max(tensor.nbytes for tensor in tensors.values())
    assert working_set.bytes == SCRATCH_BYTES + max(others, 2 * tensors[name].nbytes)


@pytest.mark.parametrize("recipe", ["none", "w8a16"])
def test_merged_experts_are_the_working_set(recipe: str, tmp_path: Path) -> None:
    folder = write_checkpoint("qwen3_moe", tmp_path / "moe", dtype="bfloat16")
    one_by_one = plan(folder, recipe, "bfloat16").working_set
    # Tiny experts are less than 64 MB in any case; what counts is which of the two is larger.
    experts = 8 * 3 * 48 * 64
    embedding = 300 * 64
    assert experts > embedding
    assert one_by_one.bytes == 2 * experts + SCRATCH_BYTES
    assert one_by_one.source == "the experts of model.layers.1.mlp.experts"
    assert plan(folder, recipe, "float32").working_set.bytes == (4 if recipe == "none" else 2) * experts + SCRATCH_BYTES


def test_experts_that_lie_stacked_are_tensors_like_others(tmp_path: Path) -> None:
    folder = write_checkpoint("gpt_oss", tmp_path / "stacked")
    largest = max(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    working_set = plan(folder, "w8a16").working_set
    assert working_set.bytes == largest + SCRATCH_BYTES
    assert working_set.source.startswith("the tensor ")
