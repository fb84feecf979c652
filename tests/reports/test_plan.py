"""A plan for people and for programs: kinds of modules, their patterns, and the figures below them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from rich.console import Console

from service.loading.plan import Limits, LoadPlan
from service.loading.planning import LoadOptions, plan_model
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from service.reports.plan import module_rows, plan_as_dict, print_plan


def plan(folder: Path, recipe: str, limits: Limits | None = None) -> LoadPlan:
    options = LoadOptions(
        model=str(folder), recipe=parse_recipe(recipe), device="cpu", dtype="bfloat16", limits=limits or Limits()
    )
    return plan_model(options, LoadProgress())


def printed(planned: LoadPlan) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_plan(planned, kv_cache="auto", console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("family", ["llama_tied", "qwen3_moe", "gpt2"])
def test_modules_of_one_kind_and_scheme_are_one_row(family: str, checkpoint: Callable[[str], Path]) -> None:
    planned = plan(checkpoint(family), "w4a16,*.1.*=w8a16")
    rows = module_rows(planned)
    assert len({(row.pattern, row.scheme) for row in rows}) == len(rows)
    assert sum(row.count for row in rows) == len(planned.modules)
    assert sum(row.bytes for row in rows) == planned.quantized_bytes
    for row in rows:
        matched = [m for m in planned.modules if fnmatchcase(m.name, row.pattern) and m.scheme == row.scheme]
        assert len(matched) >= row.count
    layers = {row.scheme: row.count for row in rows if row.pattern.endswith((".q_proj", ".c_proj"))}
    assert layers["w8a16"] == 1
    assert layers["w4a16-g64"] >= 1


def test_the_pattern_of_a_row_is_one_for_a_recipe(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mixtral")
    (experts,) = [row for row in module_rows(plan(folder, "w8a16")) if row.pattern.endswith("experts.down_proj")]
    (changed,) = [
        row for row in module_rows(plan(folder, f"w8a16,{experts.pattern}=nf4")) if row.pattern == experts.pattern
    ]
    assert (experts.scheme, changed.scheme) == ("w8a16", "nf4")
    assert changed.bytes < experts.bytes


def test_the_parts_of_the_peak_are_told(checkpoint: Callable[[str], Path]) -> None:
    planned = plan(checkpoint("llama"), "w8a16")
    told = plan_as_dict(planned, kv_cache="auto")
    assert sum(value for value in told["peak"].values() if isinstance(value, int)) == told["peak_bytes"]
    assert told["peak"]["working_set"] in ("the tensor model.embed_tokens.weight", "the tensor lm_head.weight")
    assert told["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 2
    assert plan_as_dict(planned, kv_cache="int8")["kv_bytes_per_token"] == 2 * 3 * 2 * (16 + 2)
    assert told["refusal"] is None


def test_what_is_needed_with_keys_and_values_is_told(checkpoint: Callable[[str], Path]) -> None:
    """They come in the place of the working set: the peak alone would not say what is refused."""
    kv_memory = 10**9
    planned = plan(checkpoint("llama"), "w8a16", Limits(kv_memory_bytes=kv_memory))
    told = plan_as_dict(planned, kv_cache="auto")
    assert told["kv_memory_bytes"] == kv_memory
    assert told["needed_bytes"] == told["peak_bytes"] - told["peak"]["working_set_bytes"] + kv_memory
    assert "needed              954 MiB by --kv-memory; with it " in printed(planned)
    without = plan(checkpoint("llama"), "w8a16")
    told = plan_as_dict(without, kv_cache="auto")
    assert (told["kv_memory_bytes"], told["needed_bytes"]) == (0, told["peak_bytes"])
    assert "--kv-memory" not in printed(without)


def test_a_table_says_whether_it_fits(checkpoint: Callable[[str], Path]) -> None:
    planned = plan(checkpoint("llama"), "w8a16")
    assert "fits                yes" in printed(planned)
    refused = replace(planned, refusal="it is too large", is_limited=True, device_bytes=5, device_available_bytes=4)
    text = printed(refused)
    assert "fits                no" in text
    assert " by --memory" in text
    assert "device              5 B of 4 B" in text
