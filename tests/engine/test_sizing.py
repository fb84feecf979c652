"""How much memory keys and values get."""

from __future__ import annotations

import pytest
import torch

from service.engine.sizing import kv_memory_bytes, token_bytes
from service.errors import SettingError
from service.loading import memory
from service.loading.kv_shape import KVLayer, kv_layers
from tests.models import build_model

TOKEN_BYTES = 3 * 2 * 2 * 16 * 4
"""Of the llama families in float32: layers, K and V, heads, size."""


def test_keys_and_values_of_64_sequences_are_wanted() -> None:
    model = build_model("llama")
    assert kv_memory_bytes(model, requested=None, max_num_seqs=64, max_model_len=256) == 64 * 256 * TOKEN_BYTES
    assert token_bytes(kv_layers(model.config), torch.float32) == TOKEN_BYTES


def test_a_limit_of_the_process_leaves_a_tenth_of_what_it_has_not_taken() -> None:
    model, left = build_model("llama"), 64 * 10**6
    limit = memory.resident_bytes() + left
    num_bytes = kv_memory_bytes(model, requested=None, max_num_seqs=4096, max_model_len=2048, memory_limit=limit)
    assert num_bytes == pytest.approx(left / 10, abs=10**6)  # the process may have grown by some pages


def test_what_the_limit_does_not_leave_is_not_given() -> None:
    model = build_model("llama")
    with pytest.raises(SettingError, match="--kv-memory 1000: only 0 bytes are free; lower it"):
        kv_memory_bytes(model, requested=1000, max_num_seqs=1, max_model_len=16, memory_limit=10**6)


def test_a_model_without_attention_stores_nothing_for_a_token() -> None:
    config = build_model("llama").config
    config.num_attention_heads = 0
    assert kv_layers(config) == ()


def test_layers_that_do_not_attend_store_nothing() -> None:
    config = build_model("qwen3", num_hidden_layers=4).config
    config.layer_types = ["linear_attention", "full_attention", "conv", "sliding_attention"]
    assert kv_layers(config) == 2 * (KVLayer(num_heads=2, key_size=16, value_size=16),)


def test_layers_may_differ() -> None:
    config = build_model("gemma2").config
    config.per_layer_config = {1: {"head_dim": 32}}
    assert kv_layers(config) == (KVLayer(2, 16, 16), KVLayer(2, 32, 32))
