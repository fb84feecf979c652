"""`POST /v1/completions`, as OpenAI's clients know it."""

from __future__ import annotations

import json

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service.api.chunks import ChunkWriter, head_of_answer, usage_of
from service.api.event_stream import open_stream
from service.api.generation import Delta, Generation
from service.api.schemas import CompletionRequest
from service.api.state import ServiceState

_DEFAULT_MAX_TOKENS = 16


def completions_router(state: ServiceState) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        with Generation(state, state.require_served(body.model)) as generation:
            head = head_of_answer("cmpl", "text_completion", state.model_name)
            await generation.start(body.prompt, body, param="prompt", default_max_tokens=_DEFAULT_MAX_TOKENS)
            generation.watch(request)
            if body.stream:
                writer = _CompletionChunks(head, generation, body)
                return await open_stream(generation, render=writer.render, last_event=writer.last_event)
            choices = [
                {
                    "index": index,
                    "text": result.text,
                    "logprobs": None if body.logprobs is None else generation.logprobs.completion(result.scores),
                    "finish_reason": result.finish_reason,
                }
                for index, result in enumerate(await generation.results())
            ]
            return JSONResponse(head | {"choices": choices, "usage": usage_of(generation)})

    return router


class _CompletionChunks(ChunkWriter):
    def events(self, delta: Delta) -> str:
        if not delta.text and delta.finish_reason is None:
            return ""
        logprobs = json.dumps(self._generation.logprobs.completion(delta.scores) if delta.scores else None)
        return self.event(delta.index, f'"text": {json.dumps(delta.text)}', delta.finish_reason, logprobs=logprobs)
