"""How far the distributions of two servers lie apart on a text, from what they tell of them: their likeliest tokens.

At each token of a text a server tells the probability of that token and of its likeliest 20. Tokens of which both
servers tell one are compared each by itself, all others together as one. Putting tokens together never makes the
Kullback-Leibler divergence larger (the log sum inequality: Cover and Thomas, Elements of Information Theory, 2.7), so
that what comes out is a lower bound of the divergence over the whole vocabulary, and close to it where the tokens that
are compared by themselves have almost all of the probability. Perplexities, and which token is likeliest, are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from service.reports.bench_client import Position
from service.reports.percentiles import percentile

WINDOW_TOKENS: Final = 256
MAX_WINDOWS: Final = 16
ESTIMATE: Final = (
    "KL(reference || other) over the tokens of which both servers tell the probability (the token of the text and the "
    "likeliest 20 of each), all others as one: a lower bound of the KL over the whole vocabulary"
)

_ROUNDING = 1e-6
"""Of a sum of 41 float32 probabilities; the other server's remainder is taken as larger by it, the bound as smaller."""
_LARGEST_LOSS = 700.0
"""Nats; the exponential of more is no float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Two servers on one text; see the module.

    Attributes:
        reference: URL of the server whose distribution counts as the true one.
        other: URL of the one that is held against it.
        estimate: what `kl_mean_nats` and `kl_p99_nats` are.
        compared_ratio: share of the reference's probability on tokens that are compared each by itself, mean.
        top1_ratio: share of the tokens where both have the same likeliest token.
    """

    reference: str
    other: str
    estimate: str
    num_tokens: int
    num_windows: int
    kl_mean_nats: float
    kl_p99_nats: float
    compared_ratio: float
    top1_ratio: float
    reference_perplexity: float
    other_perplexity: float


def windows(text_ids: Sequence[int], prefix_ids: Sequence[int], *, max_model_len: int) -> list[list[int]]:
    """Pieces of a text, each with the special tokens before it; a last one that is shorter is left out."""
    room = min(WINDOW_TOKENS, max_model_len - 1, len(prefix_ids) + len(text_ids)) - len(prefix_ids)
    if room < 2:  # the first token has no probability
        return []
    starts = range(0, len(text_ids) - room + 1, room)
    return [[*prefix_ids, *text_ids[start : start + room]] for start in starts][:MAX_WINDOWS]


def kl_lower_bound(reference: Position, other: Position) -> tuple[float, float]:
    """Nats, and the share of the reference's probability that was compared token by token."""
    of_reference, of_other = ({**position.top, position.token_id: position.logprob} for position in (reference, other))
    shared = of_reference.keys() & of_other.keys()
    nats = compared = other_compared = 0.0
    for token_id in shared:
        probability = math.exp(of_reference[token_id])
        nats += probability * (of_reference[token_id] - of_other[token_id])
        compared += probability
        other_compared += math.exp(of_other[token_id])
    rest, other_rest = max(1 - compared, 0.0), max(1 - other_compared, 0.0) + _ROUNDING
    nats += rest * math.log(rest / other_rest) if rest else 0.0
    return max(0.0, nats), min(compared, 1.0)


def compare(scores: Sequence[tuple[Sequence[Position], Sequence[Position]]], *, reference: str, other: str) -> Quality:
    """All windows together, of each the positions of the reference and of the other server."""
    pairs = [pair for window in scores for pair in zip(*window, strict=True)]
    bounds = [kl_lower_bound(*pair) for pair in pairs]
    nats = [bound for bound, _ in bounds]
    losses = [fmean(-position.logprob for position in side) for side in zip(*pairs, strict=True)]
    return Quality(
        reference=reference,
        other=other,
        estimate=ESTIMATE,
        num_tokens=len(pairs),
        num_windows=len(scores),
        kl_mean_nats=fmean(nats),
        kl_p99_nats=percentile(nats, 0.99),
        compared_ratio=fmean(compared for _, compared in bounds),
        top1_ratio=fmean(_likeliest(first) == _likeliest(second) for first, second in pairs),
        reference_perplexity=math.exp(min(losses[0], _LARGEST_LOSS)),
        other_perplexity=math.exp(min(losses[1], _LARGEST_LOSS)),
    )


def _likeliest(position: Position) -> int:
    return max(position.top, key=lambda token_id: position.top[token_id])
