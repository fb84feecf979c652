"""What every quantized module holds: the buffers of one encoded weight, or of a stack of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from service.kernels import dispatch
from service.numerics.encode import EncodedWeight, decode
from service.numerics.packing import STRIP, num_strips
from service.numerics.schemes import QuantScheme
from service.numerics.storage import Buffers, TensorSpec, storage_shapes


class QuantizedModule(nn.Module):
    """Buffers `qweight`, `scales` and `zero_points` (None if symmetric) of a weight [out, in].

    They are uninitialised until a loader fills them, and keep their dtypes: `.to(dtype)`, `.half()` and
    the like move them only.

    Args:
        stacked: sizes in front of those of every buffer.
    """

    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(
        self, out_features: int, in_features: int, scheme: QuantScheme, *, stacked: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self._shape = (out_features, in_features)
        for name, spec in storage_shapes(out_features, in_features, scheme)._asdict().items():
            buffer = None if spec is None else TensorSpec((*stacked, *spec.shape), spec.dtype).empty()
            self.register_buffer(name, buffer)

    def fill(self, encoded: EncodedWeight) -> None:
        """Take over the buffers of an encoded weight."""
        self.qweight, self.scales, self.zero_points = encoded.qweight, encoded.scales, encoded.zero_points

    def row_buffers(self, first: int, num_rows: int) -> Buffers:
        """Where a run of rows is encoded to; memory for all rows is taken with the first run, on the CPU.

        Args:
            first: a multiple of `STRIP`.
        """
        return self._allocated().strips(first // STRIP, num_strips(first + num_rows))

    def _allocated(self) -> Buffers:
        for name in Buffers._fields:
            buffer = getattr(self, name)
            if buffer is not None and buffer.is_meta:
                setattr(self, name, torch.empty_like(buffer, device="cpu"))
        return Buffers(self.qweight, self.scales, self.zero_points)

    def dequantize(self) -> Tensor:
        """The weights that the module computes with: float32[out, in]."""
        out_features, in_features = self._shape
        return decode(
            self.qweight,
            self.scales,
            self.zero_points,
            scheme=self.scheme,
            out_features=out_features,
            in_features=in_features,
        )

    def require_width(self, x: Tensor) -> None:
        """Refuse an input of another width, which would be multiplied with padding or read past its end.

        Raises:
            ValueError: x is of another width.
        """
        if x.shape[-1] != self._shape[1]:
            raise ValueError(f"the input is {x.shape[-1]} wide, the weight takes {self._shape[1]}")

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x @ W.T + bias: float[..., in] -> float[..., out].

        Raises:
            ValueError: x is of another width.
        """
        self.require_width(x)
        return dispatch.linear(
            x,
            self.qweight,
            self.scales,
            self.zero_points,
            scheme=self.scheme,
            out_features=self._shape[0],
            bias=bias,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let `.to` and its relatives move the buffers and keep their dtypes."""
        before = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self
