"""What crosses between the HTTP side and the engine: plain values only, no torch and no text."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class SequenceStatus(StrEnum):
    """Where a sequence is; it moves forward only."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a sequence ended; the values are the `reason` label of `requests_finished_total`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    TIMEOUT = "timeout"
    NONFINITE = "nonfinite"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence is continued. Values are checked by the API before they come here.

    Attributes:
        max_tokens: new tokens at most, >= 1.
        temperature: 0 is greedy, else logits are divided by it; 0..2.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches it; (0, 1].
        seed: int64 of this sequence's own random generator; None draws one.
        stop_token_ids: generation ends after one of these, which is not part of the text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTimings:
    """Seconds between named events of one finished sequence, all on `time.monotonic`.

    Attributes:
        queue_s: submit to first scheduled; None if it never was.
        first_token_s: submit to first token sampled; None if there was none.
        total_s: submit to terminal event.
    """

    queue_s: float | None
    first_token_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceEvent:
    """News of one sequence from one step; the terminal one has a `finish_reason` and comes exactly once.

    Attributes:
        request_id: as given to `Engine.submit`.
        token_ids: tokens sampled since the last event, without the stop token; may be empty.
        finish_reason: None while the sequence goes on.
        error: what failed, for ERROR and NONFINITE.
        timings: with the terminal event only.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    timings: SequenceTimings | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request inside the engine. Owned by the engine thread after `Engine.submit`.

    Attributes:
        token_ids: prompt, then generated tokens (the stop token included).
        num_computed: leading tokens whose keys and values are in the KV blocks.
        block_table: KV blocks in order of position.
        submitted_at, scheduled_at, first_token_at, last_token_at: `time.monotonic` seconds.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    submitted_at: float
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt_tokens
