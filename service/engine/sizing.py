"""Memory of the engine: how much of it keys and values get, and what a device holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from service.engine.config import KVFormat
from service.engine.kv_stores import STORES
from service.errors import SettingError
from service.loading import memory
from service.loading.kv_shape import KVLayer, kv_layers

_MEMORY_SHARE = 0.1
_TOKENS_PER_SEQUENCE = 2048


def kv_memory_bytes(
    model: nn.Module,
    *,
    requested: int | None,
    max_num_seqs: int,
    max_model_len: int,
    kv_cache: KVFormat = "auto",
    memory_limit: int | None = None,
) -> int:
    """Memory for keys and values: as requested, else a tenth of what is free, at most 2048 tokens a sequence.

    A model without attention heads gets the whole tenth: it bounds states, and takes nothing in advance.

    Args:
        memory_limit: bytes that this process may hold in all; on a device it does not count.

    Raises:
        SettingError: more is requested than is free.
    """
    weight = next(model.parameters())
    is_cuda = weight.device.type == "cuda"
    available: int = torch.cuda.mem_get_info(weight.device)[0] if is_cuda else _free_bytes(memory_limit)
    if requested is not None:
        if requested > available:
            raise SettingError(f"--kv-memory {requested}: only {available} bytes are free; lower it")
        return requested
    share = int(_MEMORY_SHARE * available)
    config: Any = model.config
    layers = kv_layers(config)
    if not layers:
        return share
    num_tokens = max_num_seqs * min(max_model_len, _TOKENS_PER_SEQUENCE)
    return min(num_tokens * token_bytes(layers, weight.dtype, kv_cache), share)


def token_bytes(layers: Iterable[KVLayer], dtype: torch.dtype, kv_cache: KVFormat = "auto") -> int:
    """Bytes of the keys and values of one token that come in `dtype`."""
    head_bytes = STORES[kv_cache].head_bytes
    return sum(
        layer.num_heads * (head_bytes(layer.key_size, dtype) + head_bytes(layer.value_size, dtype)) for layer in layers
    )


def _free_bytes(memory_limit: int | None) -> int:
    """What this process may still take of the host."""
    available = memory.available_bytes()
    return available if memory_limit is None else min(available, max(0, memory_limit - memory.resident_bytes()))


def device_memory(device: torch.device) -> dict[str, int]:
    """Bytes on a device by kind, as `/metrics` shows them; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "device_allocated": torch.cuda.memory_allocated(device),
        "device_reserved": torch.cuda.memory_reserved(device),
    }
