"""Log-probabilities that the model itself gives, before any sampling parameter."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from service.engine.candidates import top
from service.engine.sequence import TokenLogprobs
from service.kernels import dispatch, native_sampling
from service.kernels.native_sampling import Logprobs

_MOST_SCORED_BYTES = 64 * 2**20
"""Of the logits float32 with which one step scores prompts; all tokens of a step may have 300 MB of them."""
_LEAST_SCORED_TOKENS = 16


def max_scored_tokens(vocab_size: int) -> int:
    """How many tokens of prompts one step scores."""
    return max(_LEAST_SCORED_TOKENS, _MOST_SCORED_BYTES // (4 * vocab_size))


def read_logprobs(logits: Tensor, tokens: Seq[int], counts: Seq[int]) -> list[TokenLogprobs]:
    """Read those of the tokens that came and of the likeliest ones.

    Args:
        logits: float32[rows, vocab] as the model gave them; overwritten where torch computes, as another array would
            cost more than the sum.
        tokens: the sampled token of each row, or the one that the prompt has.
        counts: how many of the likeliest each row asks for.
    """
    count = min(max(counts), logits.shape[1])
    library = dispatch.sampling_library(logits) if count <= native_sampling.MAX_LOGPROBS else None
    found = (
        _read_by_torch(logits, tokens, count)
        if library is None
        else native_sampling.read_logprobs(library, logits, tokens, count)
    )
    return [
        TokenLogprobs(logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for logprob, ids, values, count in zip(*found, counts, strict=True)
    ]


def _read_by_torch(logits: Tensor, tokens: Seq[int], count: int) -> Logprobs:
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    values, ids = top(logits, count)
    peaks = logits.amax(1, keepdim=True)
    totals = logits.sub_(peaks).exp_().sum(1, keepdim=True).log_().add_(peaks)
    return Logprobs((own - totals)[:, 0].tolist(), ids.tolist(), (values - totals).tolist())
