"""The layer that first computes what is no number, named; and what a report says was checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from service.loading.honesty import first_nonfinite, has_nonfinite
from tests.engine.support import make_model
from tests.loading.support import IDS, load


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -torch.inf], False),
        ([1.0, torch.inf], True),
        ([torch.nan, 0.0], True),
        ([torch.finfo(torch.float32).max], False),
        ([], False),
    ],
    ids=["mask", "infinity", "NaN", "largest", "none"],
)
def test_what_is_no_number_is_seen_and_masks_are_not(values: list[float], expected: bool) -> None:
    assert has_nonfinite(torch.tensor(values)) is expected


def test_integers_are_numbers() -> None:
    assert not has_nonfinite(torch.tensor([2**40]))


def compute(model: nn.Module) -> Callable[[], object]:
    return lambda: model(input_ids=IDS, use_cache=False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens", "Embedding"),
        ("model.layers.2.self_attn.v_proj", "Linear"),
        ("model.layers.0.mlp.down_proj", "Linear"),
        ("model.norm", "LlamaRMSNorm"),
        ("lm_head", "Linear"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@torch.no_grad()
def test_the_first_layer_that_gives_no_number_is_named(value: float, name: str, kind: str) -> None:
    model = make_model("llama")
    model.get_parameter(f"{name}.weight").fill_(value)
    found = first_nonfinite(model, compute(model))
    assert found.startswith(f"{name} ({kind})")
    assert ("whose input reaches " in found) == (name != "model.embed_tokens")
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_no_layer_of_a_sound_model_is_named() -> None:
    model = make_model("llama")
    assert first_nonfinite(model, compute(model)) == ""


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


def test_hooks_go_when_the_forward_raises() -> None:
    model = nn.Sequential(nn.Identity(), Raises())
    with pytest.raises(RuntimeError, match="not today"):
        first_nonfinite(model, lambda: model(torch.ones(1)))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("recipe", "num_assigned"), [("none", 0), ("w8a16", 3 * 7 + 1), ("w8a16,lm_head=none,*.mlp.*=none", 3 * 4)]
)
def test_the_report_says_what_was_checked(recipe: str, num_assigned: int, checkpoint: Callable[[str], Path]) -> None:
    loaded = load(checkpoint("llama"), recipe)
    honesty = loaded.report.honesty
    assert honesty.num_assigned == honesty.num_quantized == num_assigned
    assert honesty.planned_bytes == loaded.report.weight_bytes.total
    assert honesty.num_tensors >= len(loaded.model.state_dict())
    assert honesty.num_probed_tokens == 0, "nothing has computed with it yet"
