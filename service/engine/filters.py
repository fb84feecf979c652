"""What the config and class of a model tell about the ways in which it can be computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from service.errors import UnsupportedModel

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_ALWAYS_CAUSAL = {"gpt_neox", "gpt_neox_japanese"}
"""Model types whose configs say `is_decoder: false` by default, which their attention does not read."""


def check_supported(model: nn.Module) -> None:
    """Refuse a model that continues no text.

    Raises:
        UnsupportedModel: names the model type and the reason.
    """
    reason = _unsupported_reason(model)
    if reason is not None:
        raise UnsupportedModel(
            f"model type {model_type(model)!r} cannot be served: {reason}; use a decoder-only language model"
        )


def packing_obstacle(model: nn.Module) -> str | None:
    """Why a packed row would compute this model wrongly, as far as that is known without trying; None if nothing is."""
    if not getattr(model, "_supports_attention_backend", False):
        return "it has no exchangeable attention function"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state"
    other_layers = set(getattr(_text_config(model), "layer_types", None) or ()) - _LAYER_TYPES
    if other_layers:
        return f"it has layers of type {', '.join(sorted(other_layers))}"
    length_dependent = length_dependent_rope(model)
    if length_dependent:
        return f"its rotary embedding ({', '.join(length_dependent)}) depends on the longest sequence of a batch"
    return None


def length_dependent_rope(model: nn.Module) -> list[str]:
    """Rope types whose frequencies depend on the length of a sequence."""
    types = {parameters["rope_type"] for parameters in rope_parameters(model)}
    return sorted(types & _LENGTH_DEPENDENT_ROPE)


def rope_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """Each set of rotary parameters of the config, which has one, or one for each layer type, or none."""
    return list(_rope_parameters(getattr(_text_config(model), "rope_parameters", None)))


def model_type(model: nn.Module) -> str:
    """Name of the family, for messages."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def max_positions(model: nn.Module) -> int | None:
    """Positions that the model was made for, if its config tells."""
    stated = getattr(_text_config(model), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def first_position(model: nn.Module) -> int:
    """Number of a sequence's first position: RoBERTa and its kin count from behind their padding id."""
    counting = (module for module in model.modules() if hasattr(module, "create_position_ids_from_input_ids"))
    return max((module.padding_idx + 1 for module in counting if isinstance(module.padding_idx, int)), default=0)


def _unsupported_reason(model: nn.Module) -> str | None:
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        return "it is no model of transformers"
    config = _text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    is_decoder = config.model_type in _ALWAYS_CAUSAL or getattr(config, "is_decoder", True)
    if not is_decoder or not getattr(config, "is_causal", True):
        return "it attends in both directions"
    return None


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _rope_parameters(parameters: object) -> Iterator[dict[str, Any]]:
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters
        for nested in parameters.values():
            yield from _rope_parameters(nested)
