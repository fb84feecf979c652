"""`POST /tokenize` and `POST /detokenize`: what the model's tokenizer makes of a text, and the way back."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from service.api.answers import DetokenizedText, Tokens
from service.api.chat import encode_chat
from service.api.chat_schemas import DetokenizeRequest, TokenizeRequest
from service.api.openapi import worked
from service.api.rendering import long_response
from service.api.routes import JsonRoute
from service.api.state import ServedModel, ServiceState
from service.errors import InvalidRequest, PromptTooLong


def tokenization_router(state: ServiceState) -> APIRouter:
    """Both routes."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/tokenize", response_model=None, responses=worked(Tokens))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt, or of a chat as the model's template writes it."""
        served = state.require_served(body.model)
        tokens = await _tokens_of(served, body)

        def answer() -> dict[str, Any]:
            strings = {"token_strs": served.codec.names(tokens)} if body.return_token_strs else {}
            return {"count": len(tokens), "max_model_len": served.max_model_len, "tokens": tokens} | strings

        return await long_response(answer)

    @router.post("/detokenize", response_model=None, responses=worked(DetokenizedText))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Text of token ids, special tokens included."""
        served = state.require_served(body.model)
        _check_tokens(body.tokens, served)
        text = await asyncio.to_thread(served.codec.decode, body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    return router


async def _tokens_of(served: ServedModel, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest(
            f"{'neither' if body.prompt is None else 'both'} of prompt and messages given; send exactly one",
            param="prompt",
            code="missing_field" if body.prompt is None else "invalid_value",
        )
    if body.prompt is not None:
        return await served.codec.encode(
            body.prompt, param="prompt", add_special_tokens=body.add_special_tokens is not False
        )
    if body.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens is true; the chat template writes the special tokens of messages; leave it out",
            param="add_special_tokens",
            code="invalid_value",
        )
    assert body.messages is not None
    return await encode_chat(served, body.messages)


def _check_tokens(tokens: list[int], served: ServedModel) -> None:
    if len(tokens) > served.max_model_len:
        raise PromptTooLong(
            f"{len(tokens)} tokens; the context is {served.max_model_len} tokens; send fewer",
            param="tokens",
            code="context_length_exceeded",
        )
    outside = next((token for token in tokens if not 0 <= token < served.vocab_size), None)
    if outside is not None:
        raise InvalidRequest(
            f"token id {outside} is outside the vocabulary, 0..{served.vocab_size - 1}; remove it",
            param="tokens",
            code="invalid_value",
        )
