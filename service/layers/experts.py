"""Experts of a mixture: packed stacks of weights, and the forward that multiplies the experts that got tokens.

transformers keeps the weights of all experts of a layer in three-dimensional parameters of one module. Its
flags say how they are laid out and what happens between the two products:

    up = gate_up_proj (has_gate) or up_proj; stored [experts, out, in], or [experts, in, out] (is_transposed)
    x -> x @ up.T (+ up_bias if has_bias) -> _apply_gate (has_gate) or act_fn -> @ down.T (+ bias)
      -> post_expert_norm (has_post_expert_norm) -> times the router's weight -> sum over a token's experts

Source: transformers 5.23, integrations/moe.py, `use_experts_implementation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.kernels import dispatch
from service.layers.buffers import QuantizedModule
from service.numerics.encode import decode
from service.numerics.schemes import QuantScheme
from service.numerics.storage import Buffers

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class QuantizedExperts(QuantizedModule):
    """One weight [out, in] of each of several experts; buffers [experts, ...], each expert encoded by itself.

    It stands where the module of all experts had a parameter, and is multiplied by `forward_experts`.
    """

    def __init__(self, num_experts: int, out_features: int, in_features: int, scheme: QuantScheme) -> None:
        super().__init__(out_features, in_features, scheme, stacked=(num_experts,))
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features

    def expert_buffers(self, index: int) -> Buffers:
        """Where an expert is encoded to; memory for all is taken with the first, on the CPU."""
        qweight, scales, zero_points = self._allocated()
        return Buffers(qweight[index], scales[index], None if zero_points is None else zero_points[index])

    def dequantize(self) -> Tensor:
        """The weights that the module computes with: float32[experts, out, in]."""
        return torch.stack(
            [
                decode(
                    *self._buffers_of(index),
                    scheme=self.scheme,
                    out_features=self.out_features,
                    in_features=self.in_features,
                )
                for index in range(self.num_experts)
            ]
        )

    def multiply_expert(self, index: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x @ W.T + bias with one expert: float[rows, in] -> float[rows, out].

        Raises:
            ValueError: x is of another width.
        """
        self.require_width(x)
        return dispatch.linear(
            x, *self._buffers_of(index), scheme=self.scheme, out_features=self.out_features, bias=bias
        )

    def _buffers_of(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        zero_points = None if self.zero_points is None else self.zero_points[index]
        return self.qweight[index], self.scales[index], zero_points

    def extra_repr(self) -> str:
        """Sizes and scheme, for `repr`."""
        return f"{self.num_experts}, {self.in_features}, {self.out_features}, scheme={self.scheme.name}"


def experts_obstacle(module: nn.Module, leaf: str) -> str:
    """Why `forward_experts` cannot compute with a three-dimensional parameter of this module; "" if it can."""
    kind = type(module).__name__
    known = {*_FLAGS, "_is_expert_parallel"}
    flags = {name for name in vars(module) if name.startswith(("has_", "is_", "_is_expert"))}
    if not flags.issuperset(_FLAGS) or leaf not in _WEIGHTS:
        return f"{kind} has stacked weights of a layout for which this version has no quantized layer"
    if flags - known:
        return f"{kind} has experts with {', '.join(sorted(flags - known))}, which this version does not know"
    return ""


def forward_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the experts of a layer, quantized or not, for the tokens that its router sent to each.

    Args:
        module: experts as described above, without an obstacle.
        hidden_states: float[tokens, hidden].
        top_k_index: int[tokens, k]; an index beyond the experts stands for none.
        top_k_weights: float[tokens, k].

    Returns:
        float[tokens, hidden] of the dtype of `hidden_states`.
    """
    num_tokens, k = top_k_index.shape
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    order = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=_num_experts(module)).tolist()
    products = hidden_states.new_zeros(num_tokens * k, hidden_states.shape[1])
    start = 0
    for expert, count in enumerate(counts[: _num_experts(module)]):
        if not count:
            continue
        places = order[start : start + count]
        start += count
        up = _product(module, up_name, expert, hidden_states[places // k])
        gated = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        down = _product(module, "down_proj", expert, gated)
        products[places] = module.post_expert_norm(down) if module.has_post_expert_norm else down
    weighted = products.view(num_tokens, k, products.shape[1]) * top_k_weights[..., None]
    return weighted.sum(1).to(hidden_states.dtype)


def _num_experts(module: Any) -> int:
    weight = module.down_proj
    return weight.num_experts if isinstance(weight, QuantizedExperts) else len(weight)


def _product(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    """One product of one expert, its bias included."""
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    if isinstance(weight, QuantizedExperts):
        return weight.multiply_expert(expert, x, bias)
    if module.is_transposed:
        return functional.linear(x, weight[expert].t(), bias)
    return dispatch.linear_unquantized(x, weight[expert], bias)
