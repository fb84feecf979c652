"""The streamed comparison gives what transformers gives for both whole models in float32, and sees what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from service.demo import model_folder
from service.errors import CheckpointError, FidelityError, ModelNotFound
from service.layers.linear import QuantizedLinear
from service.loading.deferred import Alone, Workshop
from service.loading.fidelity import Comparison, windows_of
from service.loading.fidelity_report import NUM_TOKENS, Fidelity
from service.loading.loader import LoadedModel
from service.loading.planning import LoadOptions, plan_model
from service.loading.progress import LoadProgress
from service.loading.shards import SINGLE_NAME
from service.numerics.recipe import parse_recipe
from tests.loading.support import load, round_weights, stock
from tests.models import write_checkpoint

CPU = torch.device("cpu")
LARGE_VOCABULARY = 9000
"""More than two pieces of logits, the last of them shorter."""


def ids(loaded: LoadedModel, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(0, loaded.vocab_size, (NUM_TOKENS,), generator=generator).tolist()
    return found


def compare(loaded: LoadedModel, **workshop: Any) -> Fidelity:
    comparison = Comparison(loaded, Workshop(CPU, **workshop), LoadProgress())
    return comparison.run(windows_of(ids(loaded), loaded.served))


class Offline(NamedTuple):
    """What transformers gives: mean KL, agreement, and hidden states behind each layer but the last."""

    kl: float
    top1: float
    errors: list[float]


@torch.inference_mode()
def offline(loaded: LoadedModel, folder: Path, *, held_dtype: torch.dtype) -> Offline:
    """Both whole models in float32; what is not quantized is rounded to the dtype that it is held in."""
    original, rounded = stock(folder), stock(folder)
    for parameter in rounded.parameters():
        parameter.copy_(parameter.to(held_dtype))
    _restore_quantized(rounded, original, loaded)
    round_weights(rounded, loaded)
    windows = windows_of(ids(loaded), loaded.served)
    left, right = (model(windows, output_hidden_states=True) for model in (original, rounded))
    p, q = (output.logits.double().log_softmax(-1) for output in (left, right))
    return Offline(
        kl=float(functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()),
        top1=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        errors=[_distance(a, b) for a, b in zip(left.hidden_states[1:-1], right.hidden_states[1:-1], strict=True)],
    )


def _restore_quantized(rounded: PreTrainedModel, original: PreTrainedModel, loaded: LoadedModel) -> None:
    """Weights that are quantized are so from the dtype of the file."""
    to, of = dict(rounded.named_parameters()), dict(original.named_parameters())
    for row in loaded.report.layers:
        name = row.name if row.name in to else f"{row.name}.weight"
        if row.scheme != "none" and name in to:
            to[name].copy_(of[name])


def _distance(expected: Tensor, found: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_equal(found: Fidelity, expected: Offline) -> None:
    assert found.kl_mean_nats == pytest.approx(expected.kl, rel=0.01, abs=1e-5)
    assert found.top1_ratio == expected.top1
    errors = [layer.relative_error for layer in found.layers]
    assert errors[:-1] == pytest.approx(expected.errors, rel=0.01)


@pytest.mark.parametrize(
    ("family", "recipe", "dtype", "changes"),
    [
        ("llama", "w4a16-g64", "float32", {"vocab_size": LARGE_VOCABULARY}),
        ("llama", "w8a16", "bfloat16", {}),
        ("llama_tied", "nf4", "bfloat16", {"vocab_size": LARGE_VOCABULARY}),
        ("gemma2", "w4a16-g64", "bfloat16", {"final_logit_softcapping": 3.0, "vocab_size": LARGE_VOCABULARY}),
        ("gpt2", "w4a16-g64-sym", "float32", {}),
        ("mixtral", "w8a16", "float32", {}),
        ("granite", "w4a16-g64,*.0.*=none", "float32", {}),
    ],
    ids=[
        "gqa",
        "8 bit in 16 bit",
        "tied",
        "caps and windows",
        "transposed",
        "experts",
        "two schemes and scaled logits",
    ],
)
def test_it_is_the_comparison_of_both_whole_models(
    tmp_path: Path, family: str, recipe: str, dtype: str, changes: dict[str, Any]
) -> None:
    folder = write_checkpoint(family, tmp_path / "m", num_shards=2, **changes)
    loaded = load(folder, recipe, dtype)
    found = compare(loaded, block_weights=1024)
    assert_equal(found, offline(loaded, folder, held_dtype=getattr(torch, dtype)))
    assert found.num_tokens == NUM_TOKENS


def test_it_is_the_comparison_of_the_whole_demo_model() -> None:
    loaded = load(model_folder(), "w4a16-g64", "bfloat16")
    found = compare(loaded)
    assert_equal(found, offline(loaded, model_folder(), held_dtype=torch.bfloat16))
    assert 0.001 < (found.kl_mean_nats or 0) < 1


def test_a_model_that_is_held_in_full_has_lost_nothing(tmp_path: Path) -> None:
    loaded = load(write_checkpoint("llama", tmp_path / "m"), "none")
    found = compare(loaded)
    assert found.kl_mean_nats == pytest.approx(0, abs=1e-12)
    assert found.top1_ratio == 1
    assert [layer.relative_error for layer in found.layers] == [0, 0, 0]


def test_a_damaged_layer_is_seen_where_it_is(tmp_path: Path) -> None:
    loaded = load(write_checkpoint("llama", tmp_path / "m"), "w8a16")
    whole = compare(loaded)
    layer = loaded.model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, QuantizedLinear)
    layer.scales *= 3
    damaged = compare(loaded)
    assert (damaged.kl_mean_nats or 0) > 50 * (whole.kl_mean_nats or 1)
    errors = {found.name: found.relative_error for found in damaged.layers}
    assert errors["model.layers.0"] == whole.layers[0].relative_error
    assert errors["model.layers.1"] > 10 * whole.layers[1].relative_error


@pytest.mark.parametrize(("context", "shape"), [(64, (4, 64)), (100, (3, 100)), (256, (1, 256)), (4096, (1, 256))])
def test_a_short_context_takes_several_windows(tmp_path: Path, context: int, shape: tuple[int, int]) -> None:
    loaded = load(write_checkpoint("llama", tmp_path / "m", max_position_embeddings=context), "w8a16")
    windows = windows_of([1, 2, 3], loaded.served)
    assert windows.shape == shape
    assert windows.flatten()[:4].tolist() == [1, 2, 3, 1]
    assert compare(loaded).num_tokens == windows.numel()


class Watched(Alone):
    """Sees what a forward reads, block by block."""

    def __init__(self, seen: Callable[[], int]) -> None:
        self._seen = seen
        self.grown: list[int] = []

    def run(self, work: Callable[[int], None], firsts: range) -> None:
        for first in firsts:
            before = self._seen()
            work(first)
            self.grown.append(self._seen() - before)


def test_nothing_is_read_before_it_is_multiplied(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m", vocab_size=LARGE_VOCABULARY)
    loaded = load(folder, "w8a16")
    progress = LoadProgress()
    crew = Watched(lambda: progress.snapshot().done_bytes)
    comparison = Comparison(loaded, Workshop(CPU, crew, block_weights=2048), progress)
    assert progress.snapshot().done_bytes == 0
    comparison.run(windows_of(ids(loaded), loaded.served))
    assert max(crew.grown) == 2048 * torch.float32.itemsize
    rows_of_embedding = NUM_TOKENS * 64 * torch.float32.itemsize
    unread = (LARGE_VOCABULARY - NUM_TOKENS) * 64 * torch.float32.itemsize
    assert progress.snapshot().done_bytes <= comparison.num_bytes - unread + 2 * rows_of_embedding


def test_shards_that_are_gone_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    loaded = load(folder, "w8a16")
    (folder / SINGLE_NAME).unlink()
    with pytest.raises(ModelNotFound, match=SINGLE_NAME):
        compare(loaded)


def test_shards_that_were_cut_meanwhile_are_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    loaded = load(folder, "w8a16")
    comparison = Comparison(loaded, Workshop(CPU), LoadProgress())
    with (folder / SINGLE_NAME).open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="download the file again"):
        comparison.run(windows_of(ids(loaded), loaded.served))


def test_results_come_back_from_json() -> None:
    loaded = load(model_folder(), "w8a16")
    found = compare(loaded)
    assert Fidelity.from_dict(found.to_dict()) == found


def test_a_model_that_computes_nan_has_no_fidelity(tmp_path: Path) -> None:
    loaded = load(write_checkpoint("llama", tmp_path / "m"), "w8a16")
    next(loaded.model.parameters())[:] = torch.nan
    with pytest.raises(FidelityError, match=r"nan.* no numbers"):
        compare(loaded)


def test_a_comparison_that_goes_first_is_part_of_the_plan(tmp_path: Path) -> None:
    folder = write_checkpoint("mixtral", tmp_path / "m", hidden_size=512, intermediate_size=2048)
    options = LoadOptions(model=str(folder), recipe=parse_recipe("w8a16"), device="cpu", dtype="float32")
    without, first = (
        plan_model(replace(options, compares_first=compares), LoadProgress()) for compares in (False, True)
    )
    merged_twice = 2 * 8 * 3 * 512 * 2048 * torch.float32.itemsize
    states = 2 * NUM_TOKENS * 512 * torch.float32.itemsize
    assert first.working_set.source == "the comparison with the original"
    assert first.working_set.bytes > merged_twice + states
    assert first.peak_bytes - first.base_bytes > without.peak_bytes - without.base_bytes
