"""What is checked of a request before any state exists."""

from __future__ import annotations

import math
from collections.abc import Sequence

from service.engine.sequence import SamplingParams
from service.errors import InvalidRequest, PromptTooLong, QueueFull

_MAX_RETRY_AFTER_S = 30  # official clients wait for a minute at most


def check_token_ids(prompt_ids: Sequence[int], *, vocab_size: int) -> None:
    """Refuse a prompt that no model could compute.

    Raises:
        InvalidRequest: no token, or a token outside the vocabulary.
    """
    if not prompt_ids:
        raise InvalidRequest(
            "the prompt has 0 tokens; at least 1 is needed; add text", param="prompt", code="invalid_value"
        )
    for token_id in (min(prompt_ids), max(prompt_ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"token id {token_id} is outside the vocabulary, 0..{vocab_size - 1}; "
                "use ids of this model's tokenizer",
                param="prompt",
                code="invalid_value",
            )


def check_length(prompt_ids: Sequence[int], params: SamplingParams, *, max_model_len: int, num_slots: int) -> None:
    """Refuse a sequence that does not fit when it is alone; `num_slots` is what the KV memory holds, in tokens.

    Raises:
        PromptTooLong: prompt and `max_tokens` exceed the context or the KV memory.
    """
    num_tokens = len(prompt_ids) + params.max_tokens
    limit = min(max_model_len, num_slots)
    if num_tokens <= limit:
        return
    request = f"{len(prompt_ids)} prompt tokens and max_tokens {params.max_tokens} make {num_tokens}"
    raise PromptTooLong(
        f"{request}, the context is {limit} tokens; shorten the prompt or lower max_tokens"
        if limit == max_model_len
        else f"{request}, the KV memory holds {limit} tokens; shorten them or raise --kv-memory",
        param="prompt" if len(prompt_ids) >= limit else "max_tokens",
        code="context_length_exceeded",
    )


def check_queue(num_sequences: int, *, num_waiting: int, max_queue: int, queue_s: float) -> None:
    """Refuse sequences for which the queue has no room; `queue_s` is how long the next to begin has waited.

    Raises:
        InvalidRequest: it never has room for as many.
        QueueFull: it has none now.
    """
    if num_sequences > max_queue:
        message = f"{num_sequences} texts at once, the queue holds {max_queue}; ask for fewer, or raise --max-queue"
        raise InvalidRequest(message, code="queue_too_short")
    if num_waiting + num_sequences > max_queue:
        message = f"{num_waiting} texts wait, --max-queue allows {max_queue}; retry later"
        error = QueueFull(message, code="queue_full")
        # What has got through the queue has taken so long; sooner another try finds it as full.
        error.retry_after_s = min(max(1, math.ceil(queue_s)), _MAX_RETRY_AFTER_S)
        raise error
