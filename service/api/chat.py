"""`POST /v1/chat/completions`, as OpenAI's clients know it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service.api.chat_schemas import ChatRequest, Message
from service.api.chunks import ChunkWriter, head_of_answer, usage_of
from service.api.generation import Delta, Generation, open_stream
from service.api.state import ServedModel, ServiceState
from service.errors import InvalidRequest


def chat_router(state: ServiceState) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a chat, as the model's template writes it; by default to the end of the context."""
        served = state.require_served(body.model)
        prompt_ids = await encode_chat(served, body.messages)
        with Generation(state, served) as generation:
            await generation.start([prompt_ids], body, param="messages", default_max_tokens=None)
            generation.watch(request)
            if body.stream:
                head = head_of_answer("chatcmpl", "chat.completion.chunk", state.model_name)
                writer = _ChatChunks(head, generation, body)
                return await open_stream(generation, render=writer.render, last_event=writer.last_event)
            (result,) = await generation.results()
            message = {"role": "assistant", "content": result.text, "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": result.finish_reason}
            head = head_of_answer("chatcmpl", "chat.completion", state.model_name)
            return JSONResponse(head | {"choices": [choice], "usage": usage_of(generation)})

    return router


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
    _has_begun = False

    def render(self, deltas: list[Delta]) -> bytes:
        """As for every stream, after a first event that says who speaks."""
        events = super().render(deltas)
        if self._has_begun:
            return events
        self._has_begun = True
        return self.event(0, '"delta": {"role": "assistant", "content": ""}', None).encode("ascii") + events

    def events(self, delta: Delta) -> str:
        content = f'"delta": {{"content": {json.dumps(delta.text)}}}'
        text = self.event(delta.index, content, None) if delta.text else ""
        end = self.event(delta.index, '"delta": {}', delta.finish_reason) if delta.finish_reason else ""
        return text + end
