"""Quantized linear layers: what they hold, what they compute and what a cast leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from service.layers.linear import PackedLinear, QuantizedLinear, UnquantizedLinear, W8A16Linear, quantized_linear
from service.numerics.encode import decode, encode
from service.numerics.schemes import parse_scheme
from service.numerics.storage import storage_shapes

SCHEMES = ["w8a16", "w8a16-g128", "w4a16-g64", "w4a16-g128-sym", "nf4", "fp4"]


def filled(name: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    """A layer [33, 100] that was built on meta and given random weights."""
    with torch.device("meta"):
        layer = quantized_linear(100, 33, parse_scheme(name), bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    encoded = encode(torch.randn(33, 100, generator=generator), layer.scheme)
    layer.qweight, layer.scales, layer.zero_points = encoded[:3]
    if bias:
        layer.bias = nn.Parameter(torch.randn(33, generator=generator).to(dtype), requires_grad=False)
    return layer


@pytest.mark.parametrize("name", SCHEMES)
def test_layer_on_meta_has_the_planned_buffers_and_no_weight(name: str) -> None:
    with torch.device("meta"):
        layer = quantized_linear(100, 33, parse_scheme(name), bias=True, dtype=torch.bfloat16)
    shapes = storage_shapes(33, 100, layer.scheme)
    for buffer, planned in zip((layer.qweight, layer.scales, layer.zero_points), shapes, strict=True):
        assert planned is None or (buffer is not None and (tuple(buffer.shape), buffer.dtype) == planned)
    expected = {"qweight", "scales", "bias"} | ({"zero_points"} if shapes.zero_points else set())
    assert set(layer.state_dict()) == expected
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert (layer.in_features, layer.out_features) == (100, 33)


def test_row_wise_8_bit_has_its_own_class_and_groups_are_packed() -> None:
    assert type(filled("w8a16")) is W8A16Linear
    assert type(filled("w8a16-g128")) is PackedLinear
    assert type(filled("w4a16-g64")) is PackedLinear
    assert type(filled("nf4")) is PackedLinear


@pytest.mark.parametrize("name", SCHEMES)
def test_layer_without_bias_has_none(name: str) -> None:
    layer = filled(name, bias=False)
    assert layer.bias is None
    assert list(layer.parameters()) == []


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", SCHEMES)
def test_forward_is_the_linear_of_the_dequantized_weight(name: str, bias: bool) -> None:
    layer = filled(name, bias=bias)
    x = torch.randn(2, 3, 100)
    expected = x.double() @ layer.dequantize().double().t()
    if layer.bias is not None:
        expected += layer.bias.double()
    assert float((layer(x).double() - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("name", SCHEMES)
def test_dequantize_decodes_the_buffers(name: str) -> None:
    layer = filled(name)
    buffers = layer.qweight, layer.scales, layer.zero_points
    weight = decode(*buffers, scheme=layer.scheme, out_features=33, in_features=100)
    assert weight.shape == (33, 100)
    assert weight.dtype == torch.float32
    assert torch.equal(layer.dequantize(), weight)


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.float(),
        lambda module: module.double(),
        lambda module: module.type(torch.float16),
        lambda module: module.to("cpu", torch.float16),
    ],
    ids=["to bfloat16", "half", "float", "double", "type", "to device and dtype"],
)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_cast_reaches_the_bias_and_no_buffer(name: str, cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = filled(name, dtype=torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in layer.named_buffers()}
    expected_dtype = next(cast(nn.Linear(1, 1).bfloat16()).parameters()).dtype
    cast(nn.Sequential(layer))
    after = dict(layer.named_buffers())
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor)
    assert layer.bias is not None
    assert layer.bias.dtype == expected_dtype


def test_a_move_reaches_the_buffers() -> None:
    moved = filled("w4a16-g64").to("meta")
    assert all(tensor.is_meta for tensor in moved.state_dict().values())
    moved_and_cast = filled("w4a16-g64").to("meta", torch.bfloat16)
    assert all(tensor.is_meta for tensor in moved_and_cast.state_dict().values())
    assert moved_and_cast.qweight.dtype == torch.uint8


def test_state_dict_round_trip_computes_the_same() -> None:
    layer, other = filled("w4a16-g64"), filled("w4a16-g64")
    other.qweight.zero_()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 100)
    y: Tensor = layer(x)
    assert torch.equal(other(x), y)


def test_repr_names_the_scheme() -> None:
    assert "100, 33, scheme=w4a16-g64, bias=True" in repr(filled("w4a16-g64"))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_input_of_another_width_is_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="the input is 99 wide, the weight takes 100"):
        filled(name, dtype=dtype)(torch.ones(1, 99, dtype=dtype))


@pytest.mark.parametrize("num_rows", [1, 4, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_an_unquantized_linear_has_the_parameters_and_results_of_the_one_it_replaces(bias: bool, num_rows: int) -> None:
    linear = nn.Linear(100, 33, bias=bias, dtype=torch.bfloat16).eval()
    layer = UnquantizedLinear.in_place_of(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    x = torch.randn(num_rows, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        expected, y = linear(x), layer(x)
    # Both round float32 sums once to bfloat16; near a tie they may fall to neighbours, 2^-7 apart.
    assert (y - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("how", ["assigned", "loaded"])
def test_exchanged_tensors_end_a_fusion(how: str) -> None:
    layers = [filled("w8a16", dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    fused = [lambda x: x] * 2
    for layer, call in zip(layers, fused, strict=True):
        layer.fused = call
    assert layers[0](x) is x
    if how == "assigned":
        layers[0].qweight = layers[0].qweight.clone()
    else:
        layers[0].load_state_dict(layers[1].state_dict(), assign=True)
    assert layers[0].fused is None
    assert layers[0](x).shape == (2, 33)
