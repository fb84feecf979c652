"""Where a model first computes what is no number, for a message that names the layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def has_nonfinite(values: Tensor) -> bool:
    """Whether there is NaN or infinity among some values; negative infinity is a mask where models use it."""
    return values.is_floating_point() and bool((values.isnan() | values.isposinf()).any())


def first_nonfinite(model: nn.Module, forward: Callable[[], object]) -> str:
    """Compute once more and say which module is the first to give NaN or infinity, its kind, and what it was given.

    Args:
        forward: computes with the model.

    Returns:
        Such as "model.norm (LlamaRMSNorm), whose input reaches 3.2e+38"; "" if no module gives any.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: object, keywords: object, output: object) -> None:
        if not found and any(map(has_nonfinite, _tensors(output))):
            given = [tensor for tensor in _tensors([inputs, keywords]) if tensor.is_floating_point() and len(tensor)]
            largest = max((float(tensor.abs().amax()) for tensor in given), default=0.0)
            reach = f", whose input reaches {largest:.2g}" if given else ""
            found.append(f"{name} ({type(module).__name__}){reach}")

    hooks = [
        module.register_forward_hook(partial(look, name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
