"""What a model stores for each token that it has seen, by its config alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedConfig


class KVLayer(NamedTuple):
    """Keys and values of one token in one layer: so many heads of each, with so many values."""

    num_heads: int
    key_size: int
    value_size: int


def kv_layers(config: PreTrainedConfig) -> tuple[KVLayer, ...]:
    """What each layer that attends stores; empty for a model without attention heads.

    Layers that attend to a window only count like the others: blocks are kept for all of them alike.
    """
    text: Any = config.get_text_config()
    is_mixed = getattr(text, "is_heterogeneous", False)  # then some fields can be read layer by layer only
    layers = (_layer(text.per_layer_config[i] if is_mixed else text) for i in _attending_layers(text))
    return tuple(layer for layer in layers if layer is not None)


def _layer(config: Any) -> KVLayer | None:
    num_query_heads = getattr(config, "num_attention_heads", None)
    if not num_query_heads:
        return None
    if getattr(config, "kv_lora_rank", None) and getattr(config, "v_head_dim", None):  # stored as they are multiplied
        return KVLayer(num_query_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    num_heads = getattr(config, "num_key_value_heads", None) or num_query_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // num_query_heads
    return KVLayer(num_heads, size, size)


def _attending_layers(text: Any) -> list[int]:
    kinds = getattr(text, "layer_types", None) or ()
    attending = [i for i, kind in enumerate(kinds) if "attention" in str(kind) and kind != "linear_attention"]
    return attending or list(range(getattr(text, "num_hidden_layers", 0)))
