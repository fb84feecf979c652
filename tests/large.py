"""A checkpoint large enough to measure memory and load time with: 1.6 GB of bf16 Llama in 10 shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from service.loading.shards import INDEX_NAME

NUM_SHARDS = 10


def large_config() -> LlamaConfig:
    """Hidden 2048, 16 layers, 32000 tokens, untied: 812 M parameters."""
    return LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=5632,
        vocab_size=32000,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write_large_checkpoint(folder: Path) -> Path:
    """Write config and random weights, shard by shard, so that the writer needs one shard of memory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = large_config()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shard_bytes = 2 * sum(shape.numel() for shape in shapes.values()) / NUM_SHARDS
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    written, num_bytes = 0, 0
    for name, shape in shapes.items():
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        weight_map[name] = f"model-{written + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        num_bytes += shard[name].nbytes
        if num_bytes >= (written + 1) * shard_bytes:
            save_file(shard, folder / weight_map[name])
            shard, written = {}, written + 1
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder
