"""Linears that are computed together: which are, that they give what they give alone, and when they stop."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from service.kernels import dispatch
from service.layers.fusion import fuse, num_fused_groups, unfuse, watch_siblings
from service.layers.linear import QuantizedLinear, quantized_linear
from service.numerics.encode import encode
from service.numerics.schemes import parse_scheme
from tests.kernels.support import computing_with

SCHEMES = ["w8a16", "w8a16-g32", "w4a16-g64", "w4a16-g32-sym", "nf4", "fp4"]
IN = 100
WIDTHS = {"q": 48, "k": 16, "v": 33}
ROWS = [1, 2, 3, 4, 5, 8, 16, 17, 33, 64, 130]
NATIVE_ISAS = [isa for isa in dispatch.ISAS if isa != "torch" and not dispatch.obstacle(isa)]

Called = Callable[["Trio", Tensor], object]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    with computing_with(name):
        yield name


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_linear(
    out_features: int, scheme: str = "w4a16-g64", *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> QuantizedLinear:
    layer = quantized_linear(IN, out_features, parse_scheme(scheme), bias=bias, dtype=dtype)
    layer.fill(encode(normal(out_features, IN, seed=out_features), layer.scheme))
    if bias:
        layer.bias = nn.Parameter(normal(out_features, seed=1).to(dtype), requires_grad=False)
    return layer


class Trio(nn.Module):
    """Three layers of one input, and one of another."""

    def __init__(self, scheme: str = "w4a16-g64", *, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q, self.k, self.v = (make_linear(n, scheme, bias=bias, dtype=dtype) for n in WIDTHS.values())
        self.o = make_linear(16, scheme, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q(x), self.k(x), self.v(x), self.o(x + 1)]


def watch(trio: nn.Module, call: Called) -> list[list[QuantizedLinear]]:
    with watch_siblings(trio) as groups, torch.no_grad():
        call(trio, normal(3, IN))  # type: ignore[arg-type]
    return groups


def fused(scheme: str = "w4a16-g64", *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Trio:
    trio = Trio(scheme, bias=bias, dtype=dtype)
    fuse(*watch(trio, Trio.forward))
    assert num_fused_groups(trio) == 1
    return trio


def are_together(*outputs: Tensor) -> bool:
    """Whether outputs are columns of one product."""
    return len({output.untyped_storage().data_ptr() for output in outputs}) == 1


def assert_right(trio: Trio, name: str, x: Tensor, y: Tensor) -> None:
    """Within what two float32 sums of IN products and a bias can differ by, in any order."""
    layer: QuantizedLinear = getattr(trio, name)
    weight = layer.dequantize()
    assert layer.bias is not None
    expected = x.double() @ weight.double().t() + layer.bias.double()
    magnitude = x.double().abs() @ weight.double().abs().t() + layer.bias.double().abs()
    assert ((y - expected).abs() <= (IN + 2) * torch.finfo(torch.float32).eps * magnitude).all()


def test_layers_that_are_called_in_a_row_with_one_tensor_are_a_group() -> None:
    trio = Trio()
    assert watch(trio, Trio.forward) == [[trio.q, trio.k, trio.v]]
    assert num_fused_groups(trio) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda trio, x: [trio.q(x), trio.k(x.clone()), trio.v(x + 0)],
        lambda trio, x: [trio.q(x), trio.o(x + 1), trio.k(x)],
        lambda trio, x: trio.q(x),
        lambda trio, x: None,
        lambda trio, x: [trio.q(x=x), trio.k(x=x)],
        lambda trio, x: [trio.v(x), trio.q(x)],
        lambda trio, x: [trio(x), trio.k(x)],
        lambda trio, x: [trio.q(x), x.add_(1), trio.k(x)],
    ],
    ids=["other tensors", "another between", "one", "none", "by keyword", "ragged first", "one twice", "written to"],
)
def test_other_calls_make_no_group(call: Called) -> None:
    assert watch(Trio(), call) == []


@pytest.mark.parametrize(
    "other",
    [
        make_linear(16, "w8a16"),
        make_linear(16, bias=False),
        make_linear(16, dtype=torch.bfloat16),
        make_linear(16).to("meta"),
    ],
    ids=["scheme", "bias", "dtype of the bias", "device"],
)
def test_layers_that_differ_make_no_group(other: QuantizedLinear) -> None:
    trio = Trio()
    trio.k = other
    with watch_siblings(trio) as groups, torch.no_grad():
        x = normal(3, IN)
        trio.q(x)
        other.forward = lambda x: x  # type: ignore[method-assign]  # it is called, and computes nothing
        other(x)
        trio.v(x)
    assert groups == []


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("isa", NATIVE_ISAS, indirect=True)
def test_native_kernels_give_the_same_bits_together_and_alone(isa: str, scheme: str, bias: bool, rows: int) -> None:
    together = fused(scheme, bias=bias, dtype=torch.bfloat16)
    x = normal(2, rows, IN).bfloat16()
    outputs = together(x)
    assert are_together(*outputs[:3])
    unfuse(together)
    for y, expected in zip(outputs, together(x), strict=True):
        assert torch.equal(y, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_gives_the_same_together_but_for_the_order_of_sums(scheme: str) -> None:
    trio, x = fused(scheme), normal(5, IN)
    outputs = trio(x)
    assert are_together(*outputs[:3])
    for name, y in zip("qkv", outputs, strict=False):
        assert_right(trio, name, x, y)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fusing_changes_no_weight_and_no_byte(scheme: str) -> None:
    trio = Trio(scheme)
    weights = [layer.dequantize() for layer in (trio.q, trio.k, trio.v)]
    state = {name: tensor.clone() for name, tensor in trio.state_dict().items()}
    fuse(*watch(trio, Trio.forward))
    assert all(map(torch.equal, weights, [layer.dequantize() for layer in (trio.q, trio.k, trio.v)]))
    after = trio.state_dict()
    assert after.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(after[name], tensor)
        assert after[name].is_contiguous()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in after.values()}
    assert sum(storages.values()) == sum(tensor.nbytes for tensor in state.values())
    assert len({tensor.data_ptr() for tensor in after.values()}) == len(after)


@pytest.mark.parametrize(
    "order", ["kvq", "vkq", "qvk", "qkkv", "qqkv", "k", "qk", "vq", "qkvqkv"], ids=lambda order: "-".join(order)
)
def test_layers_that_are_called_in_another_order_are_right(order: str) -> None:
    trio = fused()
    for seed in range(3):
        x = normal(4, IN, seed=seed)
        for name in order:
            assert_right(trio, name, x, getattr(trio, name)(x))


def test_outputs_may_be_written_to() -> None:
    trio, x = fused(), normal(4, IN)
    for name in "qkkv":
        y = getattr(trio, name)(x)
        assert_right(trio, name, x, y)
        y.zero_()


def test_an_input_that_is_written_to_between_calls_is_seen() -> None:
    trio, x = fused(), normal(4, IN)
    trio.q(x)
    x += 1
    assert_right(trio, "k", x, trio.k(x))


def test_equal_inputs_are_not_the_same() -> None:
    trio, x = fused(), normal(4, IN)
    q, copied = trio.q(x), x.clone()
    k = trio.k(copied)
    assert not are_together(q, k)
    assert_right(trio, "k", copied, k)


def test_inference_mode_is_fused_too() -> None:
    trio = fused()
    with torch.inference_mode():
        x = normal(2, 3, IN)
        outputs = trio(x)
        assert are_together(*outputs[:3])
        for name, y in zip("qkv", outputs, strict=False):
            assert_right(trio, name, x, y)


def test_a_hook_that_replaces_the_input_gets_its_own_product() -> None:
    trio, x = fused(), normal(4, IN)
    trio.k.register_forward_pre_hook(lambda _layer, inputs: (inputs[0] * 2,))
    trio.q(x)
    assert_right(trio, "k", x * 2, trio.k(x))
    assert_right(trio, "v", x, trio.v(x))


def base_of(output: Tensor) -> weakref.ref[Tensor]:
    assert output._base is not None
    return weakref.ref(output._base)


def test_a_product_goes_when_all_have_taken_their_columns() -> None:
    trio, x = fused(), normal(4, IN)
    with torch.no_grad():
        product = base_of(trio.q(x))
        trio.k(x)
        assert product() is not None
        trio.v(x)
    assert product() is None


def test_after_an_exception_between_two_layers_nothing_is_kept_or_mixed_up() -> None:
    trio = fused()
    products = []

    def fail() -> None:
        x = normal(4, IN)
        products.append(base_of(trio.q(x)))
        assert products[0]() is not None
        raise RuntimeError("between two layers")

    with pytest.raises(RuntimeError, match="between"):
        fail()
    assert products[0]() is None
    x = normal(4, IN, seed=1)
    for name in "kqv":
        assert_right(trio, name, x, getattr(trio, name)(x))


@pytest.mark.parametrize("shared", [True, False], ids=["one input", "own inputs"])
def test_threads_do_not_disturb_each_other(shared: bool) -> None:
    trio = fused()
    inputs = [normal(4, IN, seed=0 if shared else seed) for seed in range(4)]
    if shared:
        inputs = inputs[:1] * 4
    barrier, failures = threading.Barrier(len(inputs)), []

    def compute(x: Tensor) -> None:
        try:
            for _ in range(50):
                barrier.wait()
                for name in "qkv":
                    y = getattr(trio, name)(x)
                    assert_right(trio, name, x, y)
                    y.zero_()
        except BaseException as error:  # noqa: BLE001 - shown below
            barrier.abort()
            failures.append(error)

    threads = [threading.Thread(target=compute, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda trio: pickle.loads(pickle.dumps(trio))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_alone(copied: Callable[[Trio], Trio]) -> None:
    trio, x = fused(), normal(4, IN)
    trio.q(x)
    other = copied(trio)
    assert (num_fused_groups(trio), num_fused_groups(other)) == (1, 0)
    trio.q.qweight.zero_()
    for name in "qkv":
        assert_right(other, name, x, getattr(other, name)(x))
        assert_right(trio, name, x, getattr(trio, name)(x))
    fuse(*watch(other, Trio.forward))
    assert num_fused_groups(other) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda trio: trio.to("cpu", torch.float64).float(),
        lambda trio: trio.to("cpu"),
        lambda trio: trio.q.double().float(),
        lambda trio: trio.v.to("cpu"),
    ],
    ids=["cast", "move", "the first", "the last"],
)
def test_a_layer_that_is_moved_or_cast_computes_alone(change: Callable[[Trio], object]) -> None:
    trio, x = fused(), normal(4, IN)
    change(trio)
    q, _, v, _ = outputs = trio(x)
    assert not are_together(q, v)
    for name, y in zip("qkv", outputs, strict=False):
        assert_right(trio, name, x, y)


def test_a_layer_that_is_filled_anew_has_its_new_weight() -> None:
    trio, x = fused(), normal(4, IN)
    trio.k.fill(encode(normal(16, IN, seed=99), trio.k.scheme))
    for name, y in zip("qkv", trio(x), strict=False):
        assert_right(trio, name, x, y)


def test_loaded_weights_reach_the_product() -> None:
    trio, other, x = fused(), Trio(), normal(4, IN)
    other.k.fill(encode(normal(16, IN, seed=99), trio.k.scheme))
    trio.load_state_dict(other.state_dict())
    outputs = trio(x)
    assert are_together(*outputs[:3])
    for name, y in zip("qkv", outputs, strict=False):
        assert_right(other, name, x, y)


def test_unfusing_says_whether_there_was_anything_to_do() -> None:
    trio, x = fused(), normal(4, IN)
    assert unfuse(trio)
    assert not unfuse(trio)
    q, k, *_ = trio(x)
    assert not are_together(q, k)
    fuse(*watch(trio, Trio.forward))
    assert are_together(*trio(x)[:3])
