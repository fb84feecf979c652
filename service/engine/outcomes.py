"""From the logits of a forward to what came of each of its works: next tokens, and scores of prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from itertools import accumulate

from torch import Tensor

from service.engine.batch import NONFINITE, Failure, Outcome, Scores, Token, Work
from service.engine.logprobs import read_logprobs
from service.engine.sampler import Sampler


def read_outcomes(logits: Tensor, works: Seq[Work], sampler: Sampler) -> dict[str, Outcome]:
    """Sample behind each work that ends its sequence, and score what is asked for.

    Args:
        logits: float32[rows, vocab] behind the last `num_logits` tokens of each work, in order; overwritten.

    Returns:
        By request id, of each work that samples or scores.
    """
    sampling = [row for row, work in enumerate(works) if work.samples]
    if len(sampling) == len(logits):  # each work has one row, so there is nothing to score
        return dict(_sample(logits, works, sampler))
    stops = list(accumulate(work.num_logits for work in works))  # behind the last row of each
    tokens = _sample(logits[[stops[row] - 1 for row in sampling]], [works[row] for row in sampling], sampler)
    outcomes: dict[str, Outcome] = dict(tokens)
    for work, stop in zip(works, stops, strict=True):
        if work.num_scored:
            token = tokens.get(work.sequence.request_id)
            if not isinstance(token, Failure):
                scored = logits[stop - work.num_logits :][: work.num_scored]
                outcomes[work.sequence.request_id] = _score(work, scored, token)
    return outcomes


def _sample(logits: Tensor, works: Seq[Work], sampler: Sampler) -> dict[str, Token | Failure]:
    """The next token of each work, or why there is none."""
    sequences = [work.sequence for work in works]
    return {
        sequence.request_id: sampler.failure(sequence.request_id) if token is None else token
        for sequence, token in zip(sequences, sampler.sample(logits, sequences), strict=True)
    }


def _score(work: Work, logits: Tensor, token: Token | None) -> Scores | Failure:
    position = work.position + work.count - work.num_logits
    tokens = work.sequence.token_ids[position + 1 : position + 1 + work.num_scored]
    counts = [work.sequence.params.num_prompt_logprobs or 0] * len(tokens)
    logprobs = tuple(read_logprobs(logits, tokens, counts))
    # Minus infinity is sound: a token that the model rules out.
    return NONFINITE if any(math.isnan(each.logprob) for each in logprobs) else Scores(position, logprobs, token)
