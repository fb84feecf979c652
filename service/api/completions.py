"""`POST /v1/completions`, as OpenAI's clients know it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.answers import Completion, CompletionChunk
from service.api.choices import Delta, Result
from service.api.chunks import ChunkWriter, head_of_answer, usage_of
from service.api.event_stream import open_stream
from service.api.generation import Generation
from service.api.openapi import worked
from service.api.preparation import preparation
from service.api.rendering import json_response, long_response
from service.api.routes import GenerationRoute
from service.api.schemas import CompletionRequest
from service.api.state import ServiceState

_DEFAULT_MAX_TOKENS = 16


def completions_router(state: ServiceState) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=GenerationRoute)

    @router.post("/v1/completions", response_model=None, responses=worked(Completion, chunk=CompletionChunk))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        served = state.require_served(body.model)
        with Generation(state, served) as generation:
            head = head_of_answer("cmpl", "text_completion", state, served)
            async with preparation(state, request):
                await generation.start(body.prompt, body, param="prompt", default_max_tokens=_DEFAULT_MAX_TOKENS)
            generation.watch(request)
            if body.stream:
                writer = _CompletionChunks(head, generation, body)
                return await open_stream(generation, render=writer.render, last_event=writer.last_event)
            results = await generation.results()
            make = partial(_answer, head, generation, body, results)
            return await long_response(make) if generation.is_long else json_response(make())

    return router


def _answer(
    head: dict[str, Any], generation: Generation, body: CompletionRequest, results: list[Result]
) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": result.prompt_text + result.text,
            "logprobs": None
            if body.logprobs is None
            else generation.logprobs.completion(result.prompt_scores + result.scores),
            "finish_reason": result.finish_reason,
        }
        for index, result in enumerate(results)
    ]
    return head | {"choices": choices, "usage": usage_of(generation)}


class _CompletionChunks(ChunkWriter):
    def events(self, delta: Delta) -> str:
        text, scores = delta.prompt_text + delta.text, delta.prompt_scores + delta.scores
        if not text and not scores and delta.finish_reason is None:
            return ""
        logprobs = json.dumps(self._generation.logprobs.completion(scores)) if scores else "null"
        return self.event(delta.index, f'"text": {json.dumps(text)}', delta.finish_reason, logprobs=logprobs)
