"""What crosses between the HTTP side and the engine: plain values only, no torch and no text."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class SequenceStatus(StrEnum):
    """Where a sequence is; it goes back from RUNNING to WAITING when others need its blocks."""

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

    They apply in this order: penalties, `logit_bias`, `min_tokens`, `grammar`, `temperature`, `top_k`,
    `top_p`, `min_p`.

    Attributes:
        max_tokens: new tokens at most; with 0 the prompt is computed, and nothing is sampled.
        temperature: 0 is greedy, else logits are divided by it; 0..2.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches it; (0, 1].
        min_p: keep the tokens that are at least so likely as a share of the likeliest; 0..1.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt and text; 0.1..10.
        frequency_penalty: taken from a logit for each time that the text has the token; -2..2.
        presence_penalty: taken from a logit if the text has the token; -2..2.
        logit_bias: token ids, each once, and what is added to their logits; -100..100.
        min_tokens: `stop_token_ids` are not sampled before so many tokens; at most `max_tokens`. Stop strings, which
            the engine does not know, leave the text of as many tokens alone.
        seed: int64 of this sequence's own random generator; None draws one.
        stop_token_ids: generation ends after one of these, which is not part of the text.
        grammar: what the text follows, as `Compile` of `service.engine.grammar` reads it; it has the last word on
            which tokens may come, also against `min_tokens`. None for any text.
        num_logprobs: likeliest tokens whose log-probabilities come with each token's own; None for no such numbers.
        num_prompt_logprobs: the same for the tokens of the prompt from the second on.
        takes_logits_as_they_are: whether nothing but temperature, top_k, top_p and min_p has a say, as follows from
            the others.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    grammar: str | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    takes_logits_as_they_are: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_penalized = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        is_changed = is_penalized or self.logit_bias or self.min_tokens or self.grammar is not None
        object.__setattr__(self, "takes_logits_as_they_are", not is_changed)


class TokenLogprobs(NamedTuple):
    """Log-probabilities in nats at one position, by the model's own logits, before any parameter changes them.

    Attributes:
        logprob: of the token that was sampled, or that the prompt has.
        top: ids of the likeliest tokens and theirs, likeliest first; of equal ones the lower id first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


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


class SequenceEvent(NamedTuple):
    """News of one sequence from one step; the terminal one has a `finish_reason` and comes exactly once.

    Attributes:
        request_id: as given to `Engine.submit`.
        token_ids: tokens sampled since the last event, without the stop token; may be empty.
        logprobs: of each of `token_ids` if the sequence asks for them, else empty.
        prompt_logprobs: of the prompt's tokens from the second on, those that follow the last event's.
        stop_token: the one that ended the sequence, if it asks for `logprobs`.
        finish_reason: None while the sequence goes on.
        error: what failed, for ERROR and NONFINITE.
        timings: with the terminal event only.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    stop_token: tuple[int, TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    timings: SequenceTimings | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request inside the engine. Owned by the engine thread after `Engine.submit`.

    Attributes:
        token_ids: prompt, then generated tokens (the stop token included).
        cache_salt: only sequences with the same one share KV blocks.
        num_computed: leading tokens whose keys and values are in the KV blocks.
        num_confirmed: leading tokens behind which logits were finite, or that others have computed.
        num_scored: leading tokens of the prompt behind which logits were turned into `prompt_logprobs`.
        block_table: KV blocks in order of position; an array, as each step copies it.
        block_hashes: of leading full blocks, as far as they were needed.
        submitted_at, scheduled_at, first_token_at, last_token_at: `time.monotonic` seconds.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    submitted_at: float
    cache_salt: str = ""
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    num_confirmed: int = 0
    num_scored: int = 0
    block_table: array[int] = field(default_factory=lambda: array("q"))
    block_hashes: list[bytes] = field(default_factory=list)
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_to_score(self) -> int:
        """Tokens of the prompt, behind the `num_scored` first, whose logits are still to be told."""
        if self.params.num_prompt_logprobs is None:
            return 0
        return self.num_prompt_tokens - 1 - self.num_scored
