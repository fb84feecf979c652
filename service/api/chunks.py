"""What OpenAI's ways of generation share: the head of an answer, its usage, and the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from typing import Any

from service.api.choices import Delta
from service.api.generation import Generation
from service.api.schemas import OpenAIFields
from service.api.state import ServedModel, ServiceState


def head_of_answer(id_prefix: str, kind: str, state: ServiceState, served: ServedModel) -> dict[str, Any]:
    """Fields that an answer, or each chunk of a stream, begins with."""
    return {
        "id": f"{id_prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": state.model_name,
        "system_fingerprint": served.report.fingerprint,
    }


def usage_of(generation: Generation) -> dict[str, int]:
    """Tokens read and delivered."""
    num_prompt, num_generated = generation.num_prompt_tokens, generation.num_generated_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


class ChunkWriter(ABC):
    """The events of one stream, put together from bytes that are ready; what a choice holds is up to subclasses.

    Args:
        head: fields of every chunk.
    """

    def __init__(self, head: dict[str, Any], generation: Generation, body: OpenAIFields) -> None:
        self._generation = generation
        self._wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._head = json.dumps(head)[:-1]
        self._before_index = f'data: {self._head}, "choices": [{{"index": '
        self._after_choice = '}], "usage": null}\n\n' if self._wants_usage else "}]}\n\n"

    def render(self, deltas: list[Delta]) -> bytes:
        """Events of what one step brought."""
        return "".join(map(self.events, deltas)).encode("ascii")

    def last_event(self) -> bytes:
        """The usage, if it is wanted."""
        if not self._wants_usage:
            return b""
        usage = json.dumps(usage_of(self._generation))
        return f'data: {self._head}, "choices": [], "usage": {usage}}}\n\n'.encode("ascii")

    @abstractmethod
    def events(self, delta: Delta) -> str:
        """Events of one delta; none if there is nothing to tell."""

    def event(self, index: int, content: str, finish_reason: str | None, *, logprobs: str = "null") -> str:
        """One event of a choice; `content` is JSON of the fields that are its own, `logprobs` JSON too."""
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        return (
            f'{self._before_index}{index}, {content}, "logprobs": {logprobs}, "finish_reason": {reason}'
            f"{self._after_choice}"
        )
