"""Linear layers with a packed weight; they compute what `nn.Linear` does with the decoded one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from service.kernels import dispatch
from service.layers.buffers import QuantizedModule
from service.numerics.schemes import W8A16, QuantScheme

_TENSORS: Final = {"qweight", "scales", "zero_points", "bias"}


class QuantizedLinear(QuantizedModule):
    """Base of the two layouts: y = x W.T + bias.

    Args:
        dtype: of the bias; activations of any float dtype are taken and kept.

    Attributes:
        fused: gives the result if the layer is computed together with others, or None if it must compute alone; see
            `fusion`. Whatever exchanges, moves or casts its tensors ends it.
    """

    bias: nn.Parameter | None
    fused: Callable[[Tensor], Tensor | None] | None

    def __init__(
        self, in_features: int, out_features: int, scheme: QuantScheme, *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(out_features, in_features, scheme)
        self.in_features = in_features
        self.out_features = out_features
        empty_bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", empty_bias)
        self.fused = None

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in] -> float[..., out]."""
        if self.fused is not None and x.shape[-1] == self.in_features and (y := self.fused(x)) is not None:
            return y
        return self.multiply(x, self.bias)

    def __setattr__(self, name: str, value: Any) -> None:
        """A tensor that takes the place of another ends the fusion."""
        if name in _TENSORS:
            self.fused = None
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.fused = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Sizes and scheme, for `repr`."""
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme.name}, bias={self.bias is not None}"


class UnquantizedLinear(nn.Linear):
    """What a recipe leaves as it is in a model that is quantized otherwise: a linear that is quick at a few rows."""

    @classmethod
    def in_place_of(cls, linear: nn.Linear) -> UnquantizedLinear:
        """A layer with the very parameters of another."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in] -> float[..., out]."""
        return dispatch.linear_unquantized(x, self.weight, self.bias)


class W8A16Linear(QuantizedLinear):
    """int8 codes with one float32 scale per output row."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, W8A16, bias=bias, dtype=dtype)


class PackedLinear(QuantizedLinear):
    """8- or 4-bit codes with scales, and zero points if asymmetric, per group."""


def quantized_linear(
    in_features: int, out_features: int, scheme: QuantScheme, *, bias: bool, dtype: torch.dtype
) -> QuantizedLinear:
    """The layer for a scheme other than `none`, uninitialised, on the current default device."""
    if scheme == W8A16:
        return W8A16Linear(in_features, out_features, bias=bias, dtype=dtype)
    return PackedLinear(in_features, out_features, scheme, bias=bias, dtype=dtype)
