"""Chooses next tokens from logits: greedy, or temperature, top_k and top_p with a generator per sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.sequence import SamplingParams

_NUM_CANDIDATES = (256, 4096)
"""Likeliest tokens looked at before the whole vocabulary is; to pick 256 takes 1/40 of the time of a full sort."""


class Sampler:
    """Samples, and keeps the random generator of each sequence. Owned by the engine thread.

    One uniform number of a sequence's own generator is spent per sampled token, so what a seed
    gives does not depend on its neighbours.
    """

    def __init__(self) -> None:
        self._generators: dict[str, torch.Generator] = {}

    def sample(self, logits: Tensor, rows: Sequence[tuple[str, SamplingParams]]) -> list[int | None]:
        """Choose a token for each row.

        Args:
            logits: float32[rows, vocab].
            rows: request id and parameters of each.

        Returns:
            A token id for each row; None where the logits have NaN, +inf or nothing but -inf.
        """
        peaks, likeliest = logits.max(dim=-1)  # NaN counts as the largest value
        finite = peaks.isfinite().tolist()
        tokens: list[int | None] = likeliest.tolist()
        for row, (request_id, params) in enumerate(rows):
            if not finite[row]:
                tokens[row] = None
            elif params.temperature > 0:
                candidates, probabilities = warp(logits[row], params)
                tokens[row] = _draw(candidates, probabilities, self._generator(request_id, params.seed))
        return tokens

    def forget(self, request_id: str) -> None:
        """Drop the generator of a sequence that has ended."""
        self._generators.pop(request_id, None)

    def _generator(self, request_id: str, seed: int | None) -> torch.Generator:
        generator = self._generators.get(request_id)
        if generator is None:
            generator = self._generators[request_id] = torch.Generator()
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed)
        return generator


def warp(logits: Tensor, params: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """Apply temperature > 0, then top_k, then top_p to logits float32[vocab].

    Tokens as likely as the k-th are kept too.

    Returns:
        candidates: int64[n], likeliest first, or None for the whole vocabulary in its own order.
        probabilities: float32[n], not normalized after top_p.
    """
    # From the peak down, so that no temperature can overflow.
    scaled = (logits - logits.max()) / max(params.temperature, torch.finfo(torch.float32).tiny)
    if params.top_k == 0 and params.top_p == 1:
        return None, scaled.softmax(-1)
    for num_candidates in (*_NUM_CANDIDATES, len(scaled)):
        scores, candidates = scaled.topk(min(num_candidates, len(scaled)))
        num_kept = _num_kept(scores, scaled, params)
        if num_kept < len(scores) or len(scores) == len(scaled):
            break
    return candidates[:num_kept], scores[:num_kept].softmax(-1)


def _num_kept(scores: Tensor, scaled: Tensor, params: SamplingParams) -> int:
    """How many of the falling `scores` float32[n], the largest of `scaled`, pass; n if more than n might."""
    num_kept = len(scores)
    total = scaled
    if params.top_k:
        num_kept = int((scores >= scores[min(params.top_k, len(scores)) - 1]).sum())
        if num_kept == len(scores) < len(scaled):
            return num_kept
        total = scores[:num_kept]
    if params.top_p < 1:
        probabilities = (scores[:num_kept] - total.logsumexp(-1)).exp()
        likelier = probabilities.cumsum(-1) - probabilities
        num_kept = max(1, int((likelier < params.top_p).sum()))
    return num_kept


def _draw(candidates: Tensor | None, probabilities: Tensor, generator: torch.Generator) -> int:
    """Invert the cumulative distribution at one uniform number of the generator."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand((), dtype=torch.float64, generator=generator).to(cumulative.device)
    index = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp_(max=len(cumulative) - 1)
    return int(index if candidates is None else candidates[index])
