"""What one step computes, and what came of it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from service.engine.sequence import FinishReason, Sequence, TokenLogprobs
from service.engine.stats import StepStats


@dataclass(frozen=True, slots=True)
class Work:
    """The share of one sequence in a step: `count` tokens from `position` on."""

    sequence: Sequence
    position: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the next token can be sampled after this work."""
        return self.position + self.count == len(self.sequence.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """How many of the tokens are computed as a prompt is; generated ones too, if they are computed again."""
        is_decode = self.count == 1 and self.position >= self.sequence.num_prompt_tokens
        return 0 if is_decode else self.count


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


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sequence has no next token: ERROR or NONFINITE, and the text for the client."""

    reason: Literal[FinishReason.ERROR, FinishReason.NONFINITE]
    error: str


Outcome = Token | Failure
"""What a step made of one sequence: its next token, or a failure."""


@dataclass(slots=True)
class Intervals:
    """Seconds between the tokens of one step and those before them, or the submits."""

    inter_token_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)


def step_stats(batch: Batch, outcomes: Mapping[str, Outcome], intervals: Intervals, now: float) -> StepStats:
    """The figures of a step that ended at `now`."""
    num_tokens = sum(work.count for work in batch.works)
    num_prompt_tokens = sum(work.num_prompt_tokens for work in batch.works)
    kind: Literal["prefill", "decode", "mixed"] = "mixed"
    if num_prompt_tokens in (0, num_tokens):
        kind = "prefill" if num_prompt_tokens else "decode"
    return StepStats(
        kind=kind,
        seconds=now - batch.started_at,
        num_sequences=len(batch.works),
        num_tokens=num_tokens,
        num_prompt_tokens=num_prompt_tokens,
        num_sampled=sum(isinstance(outcome, Token) for outcome in outcomes.values()),
        inter_token_s=tuple(intervals.inter_token_s),
        first_token_s=tuple(intervals.first_token_s),
        queue_s=batch.queue_s,
        num_hit_tokens=batch.num_hit_tokens,
        num_preempted=len(batch.preempted),
    )
