"""Memory of the engine: how much of it keys and values get, and what a device holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from service.engine.config import KVFormat
from service.engine.kv_stores import STORES
from service.errors import SettingError
from service.loading import memory

_MEMORY_SHARE = 0.1
_TOKENS_PER_SEQUENCE = 2048


def kv_memory_bytes(
    model: nn.Module, *, requested: int | None, max_num_seqs: int, max_model_len: int, kv_cache: KVFormat = "auto"
) -> int:
    """Memory for keys and values: as requested, else a tenth of what is free, at most 2048 tokens a sequence.

    A model without attention heads gets the whole tenth: it bounds states, and takes nothing in advance.

    Raises:
        SettingError: more is requested than is free.
    """
    weight = next(model.parameters())
    is_cuda = weight.device.type == "cuda"
    available: int = torch.cuda.mem_get_info(weight.device)[0] if is_cuda else memory.available_bytes()
    if requested is not None:
        if requested > available:
            raise SettingError(f"--kv-memory {requested}: only {available} bytes are free; lower it")
        return requested
    share = int(_MEMORY_SHARE * available)
    config: Any = model.config
    config = config.get_text_config()
    num_query_heads = getattr(config, "num_attention_heads", None)
    if not num_query_heads:
        return share
    num_heads = getattr(config, "num_key_value_heads", None) or num_query_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_query_heads
    head_bytes = STORES[kv_cache].head_bytes(head_size, weight.dtype)
    bytes_per_token = 2 * config.num_hidden_layers * num_heads * head_bytes
    wanted: int = max_num_seqs * min(max_model_len, _TOKENS_PER_SEQUENCE) * bytes_per_token
    return min(wanted, share)


def device_memory(device: torch.device) -> dict[str, int]:
    """Bytes on a device by kind, as `/metrics` shows them; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "device_allocated": torch.cuda.memory_allocated(device),
        "device_reserved": torch.cuda.memory_reserved(device),
    }
