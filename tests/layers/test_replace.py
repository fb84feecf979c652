"""Which weights of a model get which scheme, and why others do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from service.layers.embedding import QuantizedEmbedding
from service.layers.replace import Slot, Vocabulary, assign_schemes, swap
from service.numerics.encode import encode
from service.numerics.recipe import parse_recipe
from service.numerics.schemes import NONE, W8A16


class OddLinear(nn.Linear):
    """A linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


class TinyScaledWordEmbedding(nn.Embedding):
    """An embedding that is multiplied as Gemma's is."""

    def __init__(self, scale: float) -> None:
        super().__init__(20, 32)
        self.scalar_embed_scale = scale
        self.embed_scale = nn.Buffer(torch.tensor(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class OffsetEmbedding(nn.Embedding):
    """An embedding that counts from 2, as OPT's positions do."""


class Mixture(nn.Module):
    """The linears around experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.shared_expert_gate = nn.Linear(32, 1)
        self.router = nn.ModuleDict({"layer": nn.Linear(32, 4)})
        self.experts = nn.ModuleList([nn.Linear(32, 32)])
        self.gate_proj = nn.Linear(32, 32)


class Dense(nn.Module):
    """A gate that chooses no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 32)


class Model(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = TinyScaledWordEmbedding(3.3)
        self.positions = OffsetEmbedding(20, 32)
        self.moe = Mixture()
        self.mlp = Dense()
        self.odd = OddLinear(32, 32)
        self.conv = nn.Conv1d(32, 32, 4)
        self.mix = nn.Parameter(torch.empty(1, 1, 32))
        self.odd_stack = nn.Bilinear(32, 32, 3)
        self.head = nn.Linear(32, 20, bias=False)


def slots(recipe: str, *, is_tied: bool = False) -> dict[str, Slot]:
    with torch.device("meta"):
        model = Model()
    vocabulary = Vocabulary(embedding="embed", head="head", is_tied=is_tied)
    found = assign_schemes(model, parse_recipe(recipe), vocabulary, transposed_types=())
    return {slot.name: slot for slot in found}


def test_linears_are_quantized_and_routers_are_not() -> None:
    found = slots("w8a16")
    quantized = {name for name, slot in found.items() if slot.is_to_be_quantized}
    assert quantized == {"moe.experts.0", "moe.gate_proj", "mlp.gate", "head"}
    for name in ("moe.gate", "moe.shared_expert_gate", "moe.router.layer"):
        assert (found[name].scheme, found[name].reason) == (NONE, "routers stay as they are")


def test_what_computes_something_else_has_an_obstacle() -> None:
    found = slots("w8a16,positions=w8a16")
    assert found["odd"].obstacle == "OddLinear has no quantized layer in this version"
    assert found["positions"].obstacle == "OffsetEmbedding has no quantized layer in this version"
    assert "Bilinear has stacked weights of a layout" in found["odd_stack.weight"].obstacle
    for name in ("odd", "positions", "odd_stack.weight"):
        assert found[name].scheme == W8A16
        assert not found[name].is_to_be_quantized
    assert not any(name.startswith(("conv", "mix")) for name in found)


def test_a_pattern_reaches_what_stays_by_default() -> None:
    found = slots("w8a16,moe.gate=w8a16,embed=w8a16")
    assert found["moe.gate"].is_to_be_quantized
    assert found["embed"].is_to_be_quantized
    assert not slots("w8a16")["embed"].is_to_be_quantized


def test_a_tied_scaled_embedding_is_quantized_with_its_head() -> None:
    found = slots("w4a16", is_tied=True)
    assert (found["embed"].scheme, found["head"].scheme, found["head"].shares) == (W8A16, W8A16, "embed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [8.0, 3.3])
def test_a_scaled_embedding_rounds_and_multiplies_like_the_stock_one(scale: float, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"embed": TinyScaledWordEmbedding(scale)})
    weight = model["embed"].get_parameter("weight").detach()
    layer = swap(model, Slot(name="embed", shape=(20, 32), scheme=W8A16), dtype)
    assert isinstance(layer, QuantizedEmbedding)
    layer.fill(encode(weight, W8A16))
    stock = TinyScaledWordEmbedding(scale)
    stock.weight.data.copy_(layer.dequantize())
    ids = torch.arange(20)[None]
    assert torch.equal(model["embed"](ids), stock.to(dtype)(ids))


def test_shapes_of_slots_are_those_of_the_stored_weights() -> None:
    matrix = Slot(name="a", shape=(6, 4), scheme=W8A16)
    assert (matrix.parameter, matrix.stored_shape) == ("a.weight", (6, 4))
    experts = Slot(name="a.b", shape=(6, 4), scheme=W8A16, num_experts=2, is_transposed=True)
    assert (experts.parameter, experts.stored_shape) == ("a.b", (2, 4, 3))
