"""What a way of storing keys and values costs: the KL divergence from plain ones, token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from service.engine.attention import STEP_KEYWORD, Chunk, Step
from service.engine.blocks import BLOCK_SIZE, KVBlocks
from service.kernels.native_attention import Rows


@torch.inference_mode()
def log_probs(model: PreTrainedModel, ids: Tensor, kv: KVBlocks) -> Tensor:
    """Log-probabilities of every next token, float32[tokens, vocab], attending to what `kv` gives back."""
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    kv.resize(num_blocks)
    positions = torch.arange(len(ids))
    table, length = torch.arange(num_blocks), torch.tensor([len(ids)])
    rows = Rows(table, torch.tensor([0, num_blocks]), length, length)
    span = Chunk(0, len(ids), position=0, first_slot=0, block_table=table[None])
    keywords = {"use_cache": False, STEP_KEYWORD: Step(kv, positions, None, rows, lambda: [span])}
    logits: Tensor = model(input_ids=ids[None], position_ids=positions[None], **keywords).logits
    return logits[0].float().log_softmax(-1)


def divergences(model: PreTrainedModel, ids: Tensor, kv: KVBlocks) -> Tensor:
    """Nats from the distributions with plain keys and values to those with `kv`, float32[tokens]."""
    expected, actual = log_probs(model, ids, KVBlocks()), log_probs(model, ids, kv)
    return (expected.exp() * (expected - actual)).sum(-1)
