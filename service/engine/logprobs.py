"""Log-probabilities that the model itself gives, before any sampling parameter."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from service.engine.candidates import top
from service.engine.sequence import TokenLogprobs

_MOST_SCORED_BYTES = 64 * 2**20
"""Of the logits float32 with which one step scores prompts; all tokens of a step may have 300 MB of them."""
_LEAST_SCORED_TOKENS = 16


def max_scored_tokens(vocab_size: int) -> int:
    """How many tokens of prompts one step scores."""
    return max(_LEAST_SCORED_TOKENS, _MOST_SCORED_BYTES // (4 * vocab_size))


def read_logprobs(logits: Tensor, tokens: Seq[int], counts: Seq[int]) -> list[TokenLogprobs]:
    """Read those of the tokens that came and of the likeliest ones.

    Args:
        logits: float32[rows, vocab] as the model gave them; overwritten, as another array would cost more than the sum.
        tokens: the sampled token of each row, or the one that the prompt has.
        counts: how many of the likeliest each row asks for.
    """
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    values, ids = top(logits, min(max(counts), logits.shape[1]))
    peaks = logits.amax(1, keepdim=True)
    totals = logits.sub_(peaks).exp_().sum(1, keepdim=True).log_().add_(peaks)
    rows = zip((own - totals)[:, 0].tolist(), ids.tolist(), (values - totals).tolist(), counts, strict=True)
    return [
        TokenLogprobs(logprob, tuple(zip(top_ids[:count], top_logprobs[:count], strict=True)))
        for logprob, top_ids, top_logprobs, count in rows
    ]
