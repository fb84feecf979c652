"""`POST /v1/chat/completions`, as OpenAI's clients know it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.answers import ChatCompletion, ChatCompletionChunk
from service.api.chat_schemas import ChatRequest, Message
from service.api.choices import Delta, Result
from service.api.chunks import ChunkWriter, head_of_answer, usage_of
from service.api.event_stream import open_stream
from service.api.generation import Generation
from service.api.openapi import worked
from service.api.preparation import preparation
from service.api.rendering import json_response, long_response
from service.api.routes import GenerationRoute
from service.api.state import ServedModel, ServiceState
from service.errors import InvalidRequest


def chat_router(state: ServiceState) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=GenerationRoute)

    @router.post(
        "/v1/chat/completions", response_model=None, responses=worked(ChatCompletion, chunk=ChatCompletionChunk)
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a chat, as the model's template writes it; by default to the end of the context."""
        served = state.require_served(body.model)
        with Generation(state, served) as generation:
            async with preparation(state, request):
                prompt_ids = await encode_chat(served, body.messages)
                await generation.start([prompt_ids], body, param="messages", default_max_tokens=None)
            generation.watch(request)
            if body.stream:
                head = head_of_answer("chatcmpl", "chat.completion.chunk", state, served)
                writer = _ChatChunks(head, generation, body)
                return await open_stream(generation, render=writer.render, last_event=writer.last_event)
            results = await generation.results()
            head = head_of_answer("chatcmpl", "chat.completion", state, served)
            make = partial(_answer, head, generation, body, results)
            return await long_response(make) if generation.is_long else json_response(make())

    return router


def _answer(head: dict[str, Any], generation: Generation, body: ChatRequest, results: list[Result]) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": generation.logprobs.chat(result.scores) if body.logprobs else None,
            "finish_reason": result.finish_reason,
        }
        for index, result in enumerate(results)
    ]
    return head | {"choices": choices, "usage": usage_of(generation)}


async def encode_chat(served: ServedModel, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat; the template writes all special tokens, so that none is added to them.

    Raises:
        InvalidRequest: the model has no chat template, or it refuses the messages.
    """
    if served.chat_template is None:
        raise InvalidRequest(
            "this model has no chat template, so it takes no messages; send a prompt to /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    rendered = await served.chat_template.render([message.variables() for message in messages])
    return await served.codec.encode_chat(rendered)


class _ChatChunks(ChunkWriter):
    def __init__(self, head: dict[str, Any], generation: Generation, body: ChatRequest) -> None:
        super().__init__(head, generation, body)
        self._num_choices = body.n or 1
        self._has_begun = False

    def render(self, deltas: list[Delta]) -> bytes:
        """As for every stream, after a first event of each choice that says who speaks."""
        events = super().render(deltas)
        if self._has_begun:
            return events
        self._has_begun = True
        role = '"delta": {"role": "assistant", "content": ""}'
        roles = "".join(self.event(index, role, None) for index in range(self._num_choices))
        return roles.encode("ascii") + events

    def events(self, delta: Delta) -> str:
        content = f'"delta": {{"content": {json.dumps(delta.text)}}}'
        logprobs = json.dumps(self._generation.logprobs.chat(delta.scores)) if delta.scores else "null"
        text = self.event(delta.index, content, None, logprobs=logprobs) if delta.text or delta.scores else ""
        end = self.event(delta.index, '"delta": {}', delta.finish_reason) if delta.finish_reason else ""
        return text + end
