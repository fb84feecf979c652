"""What a plan says before a load, beside what the load then does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from service.engine.sizing import token_bytes
from service.errors import CheckpointError, DoesNotFit, ModelError, ModelNotFound, RecipeError
from service.loading import integrity
from service.loading.checkpoint import Checkpoint
from service.loading.config import read_model
from service.loading.loader import load_model
from service.loading.plan import LARGE_TENSOR_BYTES, MARGIN_BYTES, SCRATCH_BYTES, Limits, LoadPlan, plan_load
from service.loading.planning import LoadOptions, plan_model
from service.loading.progress import LoadProgress, Phase
from service.loading.source import resolve_source
from service.numerics.recipe import parse_recipe
from service.numerics.schemes import GROUP_SIZES
from tests.engine.support import running
from tests.loading.support import load
from tests.models import FAMILIES, MORE_FAMILIES, build_model, write_checkpoint
from tests.sparse import write_sparse_checkpoint

GB = 10**9
SCHEMES = [
    "none",
    "w8a16",
    *(f"w8a16-g{size}" for size in GROUP_SIZES),
    *(f"w4a16-g{size}" for size in GROUP_SIZES),
    *(f"w4a16-g{size}-sym" for size in GROUP_SIZES),
    *("nf4", "fp4"),
]
LARGE = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=128256
)
"""Llama of 8 B parameters, 16 GB: nobody writes or reads that here."""


def plan(folder: Path, recipe: str = "none", dtype: str = "float32", *, limits: Limits | None = None) -> LoadPlan:
    options = LoadOptions(
        model=str(folder), recipe=parse_recipe(recipe), device="cpu", dtype=dtype, limits=limits or Limits()
    )
    progress = LoadProgress()
    planned = plan_model(options, progress)
    assert progress.snapshot()[:2] == (Phase.PLAN, 0), "tensor data was read"
    return planned


def assert_as_planned(folder: Path, recipe: str, dtype: str) -> None:
    planned, report = plan(folder, recipe, dtype), load(folder, recipe, dtype).report
    assert planned.weight_bytes == report.weight_bytes
    assert (planned.original_bytes, planned.num_parameters) == (report.original_bytes, report.num_parameters)
    assert (planned.recipe, planned.device) == (report.recipe, report.device)
    rows = {module.name: (module.scheme, module.bytes.codes + module.bytes.scales) for module in planned.modules}
    for layer in report.layers:
        scheme, num_bytes = rows[layer.name]
        assert scheme == layer.scheme
        assert num_bytes == (0 if layer.scheme == "none" else layer.bytes)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_a_load_holds_to_the_byte_what_was_planned(family: str, checkpoint: Callable[[str], Path]) -> None:
    assert_as_planned(checkpoint(family), "w4a16-g32", "bfloat16")


@pytest.mark.parametrize("recipe", SCHEMES)
def test_every_scheme_holds_what_was_planned(recipe: str, checkpoint: Callable[[str], Path]) -> None:
    assert_as_planned(checkpoint("llama_tied"), recipe, "float32")


@pytest.mark.parametrize("recipe", ["none", "w8a16", "nf4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "opt"])
def test_experts_transposed_and_scaled_weights_are_planned(
    family: str, recipe: str, checkpoint: Callable[[str], Path]
) -> None:
    assert_as_planned(checkpoint(family), recipe, "float16")


@pytest.mark.parametrize(
    "recipe",
    [
        "w8a16,lm_head=none",
        "none,model.layers.1.*=w4a16-g64",
        "w4a16,*.down_proj=w8a16,model.embed_tokens=none",
        "w8a16,*.experts.*=none",
    ],
)
@pytest.mark.parametrize("family", ["llama_tied", "mixtral"])
def test_patterns_are_planned(family: str, recipe: str, checkpoint: Callable[[str], Path]) -> None:
    if "experts" in recipe and family != "mixtral":
        with pytest.raises(RecipeError, match=r"'\*\.experts\.\*' matches no layer"):
            plan(checkpoint(family), recipe)
        return
    assert_as_planned(checkpoint(family), recipe, "float32")


@pytest.mark.parametrize("of_file", ["float32", "bfloat16"])
def test_the_dtype_and_number_of_files_change_the_working_set_only(of_file: str, tmp_path: Path) -> None:
    dtype: str = of_file
    whole = write_checkpoint("llama", tmp_path / "whole", dtype=dtype)  # type: ignore[arg-type]
    split = write_checkpoint("llama", tmp_path / "split", dtype=dtype, num_shards=5)  # type: ignore[arg-type]
    plans = [plan(folder, "w8a16", "bfloat16") for folder in (whole, split)]
    largest = max(tensor.nbytes for tensor in load_file(whole / "model.safetensors").values())
    assert {planned.working_set.bytes for planned in plans} == {largest + SCRATCH_BYTES}
    assert plans[0].weight_bytes == plans[1].weight_bytes == load(split, "w8a16", "bfloat16").report.weight_bytes


def test_bin_files_are_planned_from_what_their_pickle_says(tmp_path: Path) -> None:
    folder = write_checkpoint("llama_tied", tmp_path / "bin")
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    assert_as_planned(folder, "w8a16", "float32")


def test_a_head_beside_its_tied_embedding_is_counted_once(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "both")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert_as_planned(folder, "w8a16", "float32")


@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "deepseek_v3", "mixtral"])
def test_a_token_takes_in_the_engine_what_was_planned(
    family: str, kv_cache: str, checkpoint: Callable[[str], Path]
) -> None:
    layers = plan(checkpoint(family)).kv_layers
    with running(build_model(family), kv_cache=kv_cache) as (engine, _):
        state = engine.state()
    num_tokens = state.num_kv_blocks * state.block_size
    assert state.kv_cache_bytes == num_tokens * token_bytes(layers, torch.float32, kv_cache)  # type: ignore[arg-type]


def test_sixteen_gigabytes_are_planned_without_being_there(tmp_path: Path) -> None:
    planned = plan(write_sparse_checkpoint(tmp_path / "large", LARGE), "w8a16", "bfloat16")
    assert planned.original_bytes == 2 * planned.num_parameters == pytest.approx(16.06 * GB, rel=1e-3)
    embedding = 2 * LARGE.vocab_size * LARGE.hidden_size
    # Of the rest: a byte for each weight, four for each of the rows, two for each of the norms.
    rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096) + LARGE.vocab_size
    norms = 65 * 4096
    num_codes = planned.num_parameters - embedding // 2 - norms
    assert planned.quantized_bytes == embedding + num_codes + 4 * rows + 2 * norms
    largest_of_a_layer = 2 * LARGE.intermediate_size * LARGE.hidden_size
    assert largest_of_a_layer < LARGE_TENSOR_BYTES < embedding  # which is read in pieces
    assert re.fullmatch(r"the tensor model\.layers\.\d+\.mlp\.\w+_proj\.weight", planned.working_set.source)
    assert planned.working_set.bytes == largest_of_a_layer + SCRATCH_BYTES
    beside = planned.working_set.bytes + MARGIN_BYTES
    assert planned.peak_bytes == planned.base_bytes + planned.quantized_bytes + beside


@pytest.mark.parametrize(
    ("recipe", "too_large", "named"),
    [
        ("none", "none", "w8a16"),
        ("none", "w8a16", "w4a16-g32"),
        ("w8a16", "w4a16-g32", "w4a16-g64"),
        ("nf4", "w4a16-g64", "w4a16-g128"),
    ],
)
def test_a_refusal_names_the_first_recipe_that_would_fit(
    recipe: str, too_large: str, named: str, tmp_path: Path
) -> None:
    folder = write_sparse_checkpoint(tmp_path / "large", LARGE)
    needs = [plan(folder, text, "bfloat16").peak_bytes for text in (too_large, named)]
    limits = Limits(memory_bytes=sum(needs) // 2)
    refused = plan(folder, recipe, "bfloat16", limits=limits)
    assert not refused.fits
    assert re.fullmatch(
        rf"large as {refused.recipe} needs {refused.peak_bytes} bytes, --memory allows {limits.memory_bytes}; "
        rf"--quantize {named} fits with \d+",
        refused.refusal,
    )
    with pytest.raises(DoesNotFit) as error:
        refused.require_fit()
    assert (str(error.value), error.value.exit_code) == (refused.refusal, 3)
    assert plan(folder, named, "bfloat16", limits=limits).fits


def test_a_refusal_says_if_no_recipe_would_fit(tmp_path: Path) -> None:
    folder = write_sparse_checkpoint(tmp_path / "large", LARGE)
    refusal = plan(folder, "w4a16", "bfloat16", limits=Limits(memory_bytes=5 * GB)).refusal
    assert re.search(
        r"none of w8a16, .*, w4a16-g128 fits, w4a16-g128 would need \d+: give more memory, or a smaller model$", refusal
    )


def test_a_load_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = write_sparse_checkpoint(tmp_path / "large", LARGE)
    options = LoadOptions(
        model=str(folder), recipe=parse_recipe("none"), device="cpu", limits=Limits(memory_bytes=9 * GB)
    )
    progress = LoadProgress()
    with pytest.raises(DoesNotFit, match="--memory allows 9000000000"):
        load_model(options, progress)
    assert progress.snapshot()[:2] == (Phase.PLAN, 0)


def test_keys_and_values_come_in_the_place_of_the_working_set(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    needed = plan(folder).peak_bytes
    slack = 50 * 10**6  # this process may grow meanwhile
    limits = Limits(memory_bytes=needed + slack, kv_memory_bytes=SCRATCH_BYTES)
    assert plan(folder, limits=limits).fits
    limits = Limits(memory_bytes=needed + slack, kv_memory_bytes=SCRATCH_BYTES + 2 * slack)
    assert "or lower --kv-memory" in plan(folder, limits=limits).refusal


@pytest.mark.parametrize("free_gb", [8, 9])
def test_a_device_must_hold_the_weights(free_gb: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * GB, 80 * GB))
    folder = write_sparse_checkpoint(tmp_path / "large", LARGE)
    source = resolve_source(str(folder), revision=None, cache_dir=None, progress=LoadProgress())
    with Checkpoint(folder, lambda num_bytes: None) as checkpoint:
        planned = plan_load(
            "large",
            read_model(source, trust_remote_code=False),
            checkpoint.refs,
            recipe=parse_recipe("w8a16"),
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
            limits=Limits(memory_bytes=100 * GB),
        )
    assert (planned.device_bytes, planned.device_available_bytes) == (planned.quantized_bytes, free_gb * GB)
    if free_gb == 9:
        assert planned.fits
    else:
        smaller = plan(folder, "w4a16-g32", "bfloat16").quantized_bytes
        assert planned.refusal == (
            f"large as w8a16 needs {planned.quantized_bytes} bytes of the device, {free_gb * GB} are free there; "
            f"--quantize w4a16-g32 fits with {smaller}"
        )


def test_without_a_limit_there_is_what_the_machine_has(checkpoint: Callable[[str], Path]) -> None:
    planned = plan(checkpoint("llama"))
    assert planned.fits
    assert not planned.is_limited
    assert planned.base_bytes < planned.available_bytes


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), ModelNotFound, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), CheckpointError, "config.json does not parse"),
        (lambda folder: (folder / "model.safetensors").unlink(), ModelNotFound, "has neither model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:100]
            ),
            CheckpointError,
            "model.safetensors is not a whole safetensors file: a header of",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]),
            CheckpointError,
            "its tensors end at byte",
        ),
    ],
    ids=["no config", "torn config", "no weights", "truncated header", "truncated data"],
)
def test_a_damaged_model_is_not_planned(
    spoil: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    spoil(folder)
    with pytest.raises(error, match=message):
        plan(folder)


def test_a_model_that_holds_something_else_than_planned_is_not_ready(checkpoint: Callable[[str], Path]) -> None:
    planned = plan(checkpoint("llama"), "w8a16").weight_bytes
    integrity.check_plan(planned, planned)
    with pytest.raises(ModelError, match=rf"holds {planned.total + 1} bytes .* {planned.total} were planned"):
        integrity.check_plan(replace(planned, scales=planned.scales + 1), planned)
