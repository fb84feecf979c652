"""`POST /v1/completions`, as OpenAI's clients know it."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service.api.generation import Delta, Generation, open_stream
from service.api.schemas import CompletionRequest
from service.api.state import ServiceState

_DEFAULT_MAX_TOKENS = 16


def completions_router(state: ServiceState) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        generation = Generation(state, state.require_served(body.model))
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.model_name,
        }
        is_streaming = False
        try:
            await generation.start(body.prompt, body, param="prompt", default_max_tokens=_DEFAULT_MAX_TOKENS)
            generation.watch(request)
            if body.stream:
                wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
                events = _CompletionEvents(head, generation, wants_usage=wants_usage)
                stream = await open_stream(generation, render=events.render, last_event=events.last_event)
                is_streaming = True
                return stream
            choices = [
                {"index": index, "text": result.text, "logprobs": None, "finish_reason": result.finish_reason}
                for index, result in enumerate(await generation.results())
            ]
            return JSONResponse(head | {"choices": choices, "usage": _usage(generation)})
        finally:
            if not is_streaming:
                generation.close()

    return router


class _CompletionEvents:
    """Chunks of one streamed completion, put together from bytes that are ready."""

    def __init__(self, head: dict[str, Any], generation: Generation, *, wants_usage: bool) -> None:
        self._generation = generation
        self._wants_usage = wants_usage
        self._head = json.dumps(head)[:-1]
        self._before_index = f'data: {self._head}, "choices": [{{"index": '
        self._after_choice = '}], "usage": null}\n\n' if wants_usage else "}]}\n\n"

    def render(self, deltas: list[Delta]) -> bytes:
        """One event for each delta that has text or ends its choice."""
        return "".join(self._event(delta) for delta in deltas if delta.text or delta.finish_reason).encode("ascii")

    def last_event(self) -> bytes:
        """The usage, if it is wanted."""
        if not self._wants_usage:
            return b""
        usage = json.dumps(_usage(self._generation))
        return f'data: {self._head}, "choices": [], "usage": {usage}}}\n\n'.encode("ascii")

    def _event(self, delta: Delta) -> str:
        reason = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
        return (
            f'{self._before_index}{delta.index}, "text": {json.dumps(delta.text)}, "logprobs": null, '
            f'"finish_reason": {reason}{self._after_choice}'
        )


def _usage(generation: Generation) -> dict[str, int]:
    num_prompt, num_generated = generation.num_prompt_tokens, generation.num_generated_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }
