"""What one step computes, and what came of it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from service.engine.sequence import FinishReason, Sequence, TokenLogprobs
from service.engine.stats import StepStats


@dataclass(slots=True)
class Work:
    """The share of one sequence in a step: `count` tokens from `position` on.

    Nobody changes one; it is not frozen because each step makes one for each sequence, in a third of the time.
    """

    sequence: Sequence
    position: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the next token can be sampled after this work."""
        return self.position + self.count == len(self.sequence.token_ids)

    @property
    def num_scored(self) -> int:
        """How many of the tokens are followed by logits that say how likely the prompt's next token was.

        They are the last ones, but for the prompt's very last, which has logits to sample from.
        """
        sequence = self.sequence
        stop = min(self.position + self.count, sequence.num_scored + sequence.num_to_score)
        return max(0, stop - max(self.position, sequence.num_scored))

    @property
    def num_logits(self) -> int:
        """How many of the last tokens are followed by logits that anyone wants; at least one."""
        if self.sequence.params.num_prompt_logprobs is None:
            return 1
        return self.num_scored + (self.samples or not self.num_scored)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes, decodes first.

    Attributes:
        queue_s: for each sequence first scheduled here, seconds since submit.
        num_hit_tokens: prompt tokens of these that the prefix cache had.
        preempted: request ids of sequences that went back to the queue.
    """

    works: tuple[Work, ...]
    started_at: float
    queue_s: tuple[float, ...] = ()
    num_hit_tokens: int = 0
    preempted: tuple[str, ...] = ()


class Token(NamedTuple):
    """The next token of a sequence, and its log-probabilities if the sequence asks for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Scores(NamedTuple):
    """How likely the prompt's tokens behind `position` and after it were, and the next token if one was sampled."""

    position: int
    prompt_logprobs: tuple[TokenLogprobs, ...]
    token: Token | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sequence has no next token: ERROR or NONFINITE, and the text for the client."""

    reason: Literal[FinishReason.ERROR, FinishReason.NONFINITE]
    error: str


NONFINITE = Failure(FinishReason.NONFINITE, "the model gave NaN or infinite logits for this sequence")

Outcome = Token | Scores | Failure
"""What a step made of one sequence: its next token, what it asks for besides, or a failure."""


@dataclass(slots=True)
class Intervals:
    """Seconds between the tokens of one step and those before them, or the submits."""

    inter_token_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)


def step_stats(batch: Batch, intervals: Intervals, now: float) -> StepStats:
    """The figures of a step that ended at `now`.

    Tokens count as a prompt's that are computed as those are; generated ones too, if they are computed again.
    """
    num_tokens = num_prompt_tokens = 0
    for work in batch.works:
        num_tokens += work.count
        if work.count > 1 or work.position < work.sequence.num_prompt_tokens:
            num_prompt_tokens += work.count
    kind: Literal["prefill", "decode", "mixed"] = "mixed"
    if num_prompt_tokens in (0, num_tokens):
        kind = "prefill" if num_prompt_tokens else "decode"
    return StepStats(
        kind=kind,
        seconds=now - batch.started_at,
        num_sequences=len(batch.works),
        num_tokens=num_tokens,
        num_prompt_tokens=num_prompt_tokens,
        inter_token_s=tuple(intervals.inter_token_s),
        first_token_s=tuple(intervals.first_token_s),
        queue_s=batch.queue_s,
        num_hit_tokens=batch.num_hit_tokens,
        num_preempted=len(batch.preempted),
    )
