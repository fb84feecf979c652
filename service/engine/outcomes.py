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
    stops = list(accumulate(work.num_logits for work in works))  # behind the last row of each
    sampling = [row for row, work in enumerate(works) if work.samples]
    sampled = logits if len(sampling) == len(logits) else logits[[stops[row] - 1 for row in sampling]]
    sequences = [works[row].sequence for row in sampling]
    outcomes: dict[str, Token | Failure] = {
        sequence.request_id: sampler.failure(sequence.request_id) if token is None else token
        for sequence, token in zip(sequences, sampler.sample(sampled, sequences), strict=True)
    }
    scores: dict[str, Outcome] = {}
    for work, stop in zip(works, stops, strict=True):
        if work.sequence.params.num_prompt_logprobs is not None and work.num_scored:
            token = outcomes.get(work.sequence.request_id)
            if not isinstance(token, Failure):
                scored = logits[stop - work.num_logits :][: work.num_scored]
                scores[work.sequence.request_id] = _score(work, scored, token)
    return outcomes | scores


def _score(work: Work, logits: Tensor, token: Token | None) -> Scores | Failure:
    position = work.position + work.count - work.num_logits
    tokens = work.sequence.token_ids[position + 1 : position + 1 + work.num_scored]
    counts = [work.sequence.params.num_prompt_logprobs or 0] * len(tokens)
    logprobs = tuple(read_logprobs(logits, tokens, counts))
    # Minus infinity is sound: a token that the model rules out.
    return NONFINITE if any(math.isnan(each.logprob) for each in logprobs) else Scores(position, logprobs, token)
