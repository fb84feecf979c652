"""Linears that share an input, multiplied as one matrix: query, key and value; gate and up.

A packed weight is a run of strips of 16 outputs, so the weights of several layers can lie one below the other in one
buffer, of which each layer holds a view. Which layers share an input is seen while the model computes: no table of
names has to know a family, and a layer that is called twice, or never, stays alone.

The first layer of a group computes the product of all and keeps the columns of the others until they are called with
the very same tensor. A layer that is called with anything else computes alone. So a model that departs from what was
seen gets the same results, later.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from service.kernels import dispatch
from service.layers.linear import QuantizedLinear
from service.numerics.packing import STRIP

_TENSORS = ("qweight", "scales", "zero_points", "bias")


class _Product(NamedTuple):
    """What is kept of a product.

    Attributes:
        input: what it is of; when that goes, so does the product.
        version: of the input, which changes when it is written to.
        columns: those that are still to be taken, by the place of their layer in the group.
    """

    input: weakref.ref[Tensor]
    version: int
    columns: dict[int, Tensor]


class _Group:
    """The tensors of several layers, one below the other, and the last product with them.

    Any number of threads may use it: a product that another thread replaces is computed again.
    """

    def __init__(self, layers: list[QuantizedLinear]) -> None:
        self._scheme = layers[0].scheme
        self._widths = [layer.out_features for layer in layers]
        self._qweight, self._scales, self._zero_points, self._bias = (_join(layers, name) for name in _TENSORS)
        self._product: _Product | None = None

    def multiply(self, x: Tensor) -> Tensor:
        """The columns of the first layer; those of the others are kept."""
        assert self._qweight is not None
        assert self._scales is not None
        y = dispatch.linear(
            x,
            self._qweight,
            self._scales,
            self._zero_points,
            scheme=self._scheme,
            out_features=sum(self._widths),
            bias=self._bias,
        )
        first, *others = torch.split(y, self._widths, dim=-1)
        self._product = _Product(weakref.ref(x, self._forget), _version(x), dict(enumerate(others, 1)))
        return first

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """The columns of another layer, once; None if the last product is not of `x` as it is now."""
        product = self._product
        if product is None or product.input() is not x or product.version != _version(x):
            return None
        columns = product.columns.pop(place, None)
        if not product.columns:
            self._product = None
        return columns

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._product is not None and self._product.input is gone:
            self._product = None


class _Member:
    """One layer's part in a group. A copy of it is None: a copied layer computes alone until it is fused anew."""

    def __init__(self, group: _Group, place: int) -> None:
        self.group = group
        self._place = place

    def __call__(self, x: Tensor) -> Tensor | None:
        return self.group.take(self._place, x) if self._place else self.group.multiply(x)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


@contextmanager
def watch_siblings(model: nn.Module) -> Iterator[list[list[QuantizedLinear]]]:
    """See which layers can be fused, from one forward within it; they compute alone.

    Outside of inference mode, so that a tensor which is written to between two calls is not taken for one input.

    Returns:
        The groups, in the order of their calls; filled at the end.
    """
    runs: list[list[QuantizedLinear]] = []
    shared: tuple[Tensor, int] | None = None
    groups: list[list[QuantizedLinear]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal shared
        assert isinstance(layer, QuantizedLinear)
        before, shared = shared, (inputs[0], _version(inputs[0])) if inputs else None
        is_same = before is not None and shared is not None and before[0] is shared[0] and before[1] == shared[1]
        if is_same and _can_follow(runs[-1][-1], layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])

    unfuse(model)
    hooks = [layer.register_forward_pre_hook(note) for layer in _linears(model)]
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    num_calls = Counter(layer for run in runs for layer in run)
    groups += [run for run in runs if len(run) > 1 and all(num_calls[layer] == 1 for layer in run)]


@torch.no_grad()
def fuse(layers: list[QuantizedLinear]) -> None:
    """Join the tensors of a group, one kind after another, and have its layers computed together."""
    group = _Group(layers)
    for place, layer in enumerate(layers):
        layer.fused = _Member(group, place)


def unfuse(model: nn.Module) -> bool:
    """Have every layer computed alone; tensors stay where they are. Whether one was not before."""
    fused = [layer for layer in _linears(model) if layer.fused is not None]
    for layer in fused:
        layer.fused = None
    return bool(fused)


def num_fused_groups(model: nn.Module) -> int:
    """Number of groups that are computed together."""
    return len({layer.fused.group for layer in _linears(model) if isinstance(layer.fused, _Member)})


def _linears(model: nn.Module) -> Iterator[QuantizedLinear]:
    return (module for module in model.modules() if isinstance(module, QuantizedLinear))


def _can_follow(above: QuantizedLinear, below: QuantizedLinear) -> bool:
    """Whether the strips of one layer can lie below those of another, for one product with the input of both."""
    return (
        above.out_features % STRIP == 0
        and above.scheme == below.scheme
        and above.qweight.device == below.qweight.device
        and (None if above.bias is None else above.bias.dtype) == (None if below.bias is None else below.bias.dtype)
    )


def _join(layers: list[QuantizedLinear], name: str) -> Tensor | None:
    """One tensor for those of this name, which become views of it."""
    parts = [part for layer in layers if (part := getattr(layer, name)) is not None]
    if not parts:
        return None
    whole = _as_they_lie(parts)
    if whole is not None:
        return whole
    whole = torch.cat(parts)
    for layer, view in zip(layers, torch.split(whole, [len(part) for part in parts]), strict=True):
        if name == "bias":
            layer.bias = nn.Parameter(view, requires_grad=False)
        else:
            setattr(layer, name, view)
    return whole


def _as_they_lie(parts: list[Tensor]) -> Tensor | None:
    """The parts as one tensor without a copy, if they lie one behind the other: they were fused and stored so."""
    first = parts[0].detach()
    end = first.storage_offset()
    for part in parts:
        is_next = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not is_next or part.storage_offset() != end or not part.is_contiguous() or part.dtype != first.dtype:
            return None
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride(), first.storage_offset())


def _version(x: Tensor) -> int:
    """Grows with every write to a tensor. Those of inference mode have none: there, what was watched is relied on."""
    return 0 if x.is_inference() else x._version
