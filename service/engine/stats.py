"""What the engine tells an observer: plain values, called on the engine thread, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from service.engine.sequence import FinishReason, SequenceTimings


class EnginePath(StrEnum):
    """In which way a model is computed, the fastest first.

    PACKED: the tokens of all sequences are one row, keys and values lie in KV blocks.
    PER_REQUEST: each sequence has a cache object of transformers, and a forward of its own in each step.
    SINGLE: the model keeps its state in its modules, so one sequence runs at a time.
    """

    PACKED = "packed"
    PER_REQUEST = "per-request"
    SINGLE = "single"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One engine step.

    Attributes:
        kind: `prefill` if all tokens were prompt tokens, `decode` if none was, else `mixed`.
        seconds: schedule to commit, monotonic.
        num_sequences, num_tokens: what the forward held.
        num_prompt_tokens: of those, prompt tokens, and generated ones that are computed again.
        inter_token_s: for each sampled token but a sequence's first, seconds since the one before.
        first_token_s: for each sequence whose first token this was, seconds since submit.
        queue_s: for each sequence first scheduled in this step, seconds since submit.
        num_hit_tokens: prompt tokens of these that the prefix cache had.
        num_preempted: sequences that went back to the queue, so that older ones find KV blocks.
    """

    kind: Literal["prefill", "decode", "mixed"]
    seconds: float
    num_sequences: int
    num_tokens: int
    num_prompt_tokens: int
    inter_token_s: tuple[float, ...]
    first_token_s: tuple[float, ...]
    queue_s: tuple[float, ...]
    num_hit_tokens: int = 0
    num_preempted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """Gauges, read at any time from any thread.

    Attributes:
        num_running, num_waiting: sequences.
        num_kv_blocks: KV blocks of `block_size` tokens each.
        num_free_kv_blocks, num_cached_kv_blocks: of those that no sequence holds, without and with cached tokens.
        kv_cache_bytes: bytes allocated for KV blocks; on other paths those of the caches that are held.
        last_step_at: Unix time of the last finished step; None before the first.
        since_step_s: seconds since then, on the monotonic clock; None before the first.
        step_limit_s: how long a step may take at most, by the speed of those so far; one that takes longer is stuck.
        has_failed: the engine thread has ended by an error of its own; only a restart helps.
        path: in which way the model is computed; None before the start.
    """

    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_free_kv_blocks: int
    num_cached_kv_blocks: int
    block_size: int
    kv_cache_bytes: int
    last_step_at: float | None
    since_step_s: float | None = None
    step_limit_s: float = math.inf
    has_failed: bool = False
    path: EnginePath | None = None


class EngineObserver(Protocol):
    """Receives engine events; must be quick and must not raise."""

    def on_step(self, stats: StepStats) -> None:
        """After each step."""

    def on_step_error(self) -> None:
        """A forward raised; sequences are then retried one by one."""

    def on_nonfinite(self) -> None:
        """A sequence had NaN or infinite logits."""

    def on_finished(self, reason: FinishReason, timings: SequenceTimings) -> None:
        """With each terminal event."""
