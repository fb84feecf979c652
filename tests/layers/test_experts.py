"""Quantized experts against transformers' own computation with the decoded weights, in every layout of the flags."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

from service.layers.experts import QuantizedExperts, experts_obstacle, forward_experts
from service.numerics.encode import encode
from service.numerics.schemes import parse_scheme
from service.numerics.storage import storage_shapes

NUM_EXPERTS, HIDDEN, INNER = 6, 40, 24
SCHEMES = ["w8a16", "w4a16-g32", "w4a16-g32-sym", "nf4"]
LAYOUTS: dict[str, dict[str, bool]] = {
    "gated": {},
    "without gate": {"has_gate": False},
    "biased": {"has_bias": True},
    "transposed": {"is_transposed": True},
    "normed": {"has_post_expert_norm": True},
    "all": {"has_bias": True, "is_transposed": True, "has_post_expert_norm": True},
}


def build(flags: dict[str, bool]) -> Any:
    """Unquantized experts of a layout, with random weights."""
    torch.manual_seed(0)
    rows = 2 * INNER if flags.get("has_gate", True) else INNER
    shapes = [(rows, HIDDEN), (HIDDEN, INNER)]
    names = ["gate_up_proj" if flags.get("has_gate", True) else "up_proj", "down_proj"]

    class Experts(nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()
            self.num_experts = NUM_EXPERTS
            self.act_fn = nn.SiLU()
            self.post_expert_norm = nn.LayerNorm(HIDDEN)
            for name, shape in zip(names, shapes, strict=True):
                stored = shape[::-1] if flags.get("is_transposed") else shape
                self.register_parameter(name, nn.Parameter(torch.randn(NUM_EXPERTS, *stored)))
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(NUM_EXPERTS, shape[0])))

        def forward(self) -> None:
            """Only the registered functions are called."""

    decorate: Any = use_experts_implementation
    experts = decorate(Experts, **flags)
    return experts(SimpleNamespace()).requires_grad_(False)


def quantize(module: Any, scheme_name: str) -> None:
    """Replace the weights of a module by quantized experts."""
    scheme = parse_scheme(scheme_name)
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if not hasattr(module, name):
            continue
        weight = getattr(module, name)
        weight = weight.mT if module.is_transposed else weight
        with torch.device("meta"):
            num_experts, rows, columns = weight.shape
            layer = QuantizedExperts(num_experts, rows, columns, scheme)
        for index, expert in enumerate(weight):
            encode(expert, scheme, into=layer.expert_buffers(index))
        delattr(module, name)
        setattr(module, name, layer)


def round_weights(module: Any, quantized: Any) -> None:
    """Give a module the decoded weights of its quantized copy."""
    for name, layer in quantized.named_children():
        if isinstance(layer, QuantizedExperts):
            decoded = layer.dequantize()
            getattr(module, name).copy_(decoded.mT if module.is_transposed else decoded)


def routed(num_tokens: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts (never the last one) and their weights."""
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.rand(num_tokens, NUM_EXPERTS - 1, generator=generator)
    weights, index = scores.topk(k)
    return torch.randn(num_tokens, HIDDEN, generator=generator), index, weights


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_experts_compute_what_transformers_computes_with_decoded_weights(
    flags: dict[str, bool], scheme: str, num_tokens: int
) -> None:
    plain, quantized = build(flags), build(flags)
    quantize(quantized, scheme)
    round_weights(plain, quantized)
    inputs = routed(num_tokens, k=2)
    expected = batched_mm_experts_forward(plain, *inputs)
    for module in (quantized, plain):  # experts that are not quantized take the same way
        found = forward_experts(module, *inputs)
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() if num_tokens else 1))


def test_an_index_beyond_the_experts_stands_for_none() -> None:
    module = build({})
    quantize(module, "w8a16")
    hidden, index, weights = routed(5, k=2)
    index[2, 1] = NUM_EXPERTS
    without = weights.clone()
    without[2, 1] = 0
    valid = index.clamp(max=NUM_EXPERTS - 1)
    assert torch.allclose(
        forward_experts(module, hidden, index, weights), forward_experts(module, hidden, valid, without)
    )


def test_a_token_gets_the_same_whatever_its_neighbours() -> None:
    module = build({})
    quantize(module, "w4a16-g32")
    hidden, index, weights = routed(9, k=3)
    together = forward_experts(module, hidden, index, weights)
    alone = torch.cat(
        [forward_experts(module, hidden[i : i + 1], index[i : i + 1], weights[i : i + 1]) for i in range(9)]
    )
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


def test_the_result_has_the_dtype_of_the_hidden_states() -> None:
    module = build({})
    quantize(module, "w8a16")
    hidden, index, weights = routed(3, k=2)
    assert forward_experts(module, hidden.bfloat16(), index, weights).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_buffers_of_experts_are_those_of_each_encoded_by_itself(scheme: str) -> None:
    parsed = parse_scheme(scheme)
    with torch.device("meta"):
        layer = QuantizedExperts(3, 10, 40, parsed)
    shapes = storage_shapes(10, 40, parsed)
    assert layer.qweight.is_meta
    weights = torch.randn(3, 10, 40)
    for index in (2, 0, 1):
        encode(weights[index], parsed, into=layer.expert_buffers(index))
    assert layer.qweight.shape == (3, *shapes.qweight.shape)
    assert layer.scales.shape == (3, *shapes.scales.shape)
    assert (layer.zero_points is None) == (shapes.zero_points is None)
    for index in range(3):
        encoded = encode(weights[index], parsed)
        assert torch.equal(layer.qweight[index], encoded.qweight)
        assert torch.equal(layer.scales[index], encoded.scales)
        if layer.zero_points is not None and encoded.zero_points is not None:
            assert torch.equal(layer.zero_points[index], encoded.zero_points)
    moved = layer.to(torch.float16)
    assert moved.scales.dtype == shapes.scales.dtype
    assert f"3, 40, 10, scheme={scheme}" in repr(layer)


def test_layouts_of_transformers_have_no_obstacle_and_others_do() -> None:
    assert all(experts_obstacle(build(flags), "down_proj") == "" for flags in LAYOUTS.values())
    assert "has stacked weights of a layout" in experts_obstacle(build({}), "kernel")
    assert "Bilinear has stacked weights of a layout" in experts_obstacle(nn.Bilinear(2, 3, 4), "weight")
    strange = build({})
    strange.has_third_product = True
    assert "experts with has_third_product, which this version does not know" in experts_obstacle(strange, "down_proj")
