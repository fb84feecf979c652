"""What `/openapi.json` says beyond what FastAPI reads from the routes: answers, errors and exact bounds."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api.answers import ChatCompletionChunk, CompletionChunk, ErrorEnvelope, GeneratedDelta
from service.api.chat_schemas import ChatRequest, DetokenizeRequest, TokenizeRequest
from service.api.schemas import CompletionRequest, GenerateRequest

SECURITY_SCHEMES = (HTTPBearer(auto_error=False), APIKeyHeader(name="X-API-Key", auto_error=False))
"""Either is right; keys are checked before FastAPI looks at these."""

Responses = dict[int | str, dict[str, Any]]

_REQUESTS = (CompletionRequest, ChatRequest, GenerateRequest, TokenizeRequest, DetokenizeRequest)
_ERRORS = {
    400: "A field, or the body as a whole, is not as the schema says, or does not fit the model",
    401: "No API key, or a wrong one, where the service has keys",
    404: "Another model",
    408: "The request did not arrive, begin or end in its time",
    413: "The body is too large",
    421: "For another host than this one",
    429: "The queue is full, or the client at its limit; `Retry-After` says when to come back",
    500: "This request failed; others are not affected",
    503: "Loading, draining, failed, or without room; `Retry-After` says when to come back, if that helps",
}
_GUARDED_ERRORS = (401, 408, 421, 429, 500, 503)
_BODY_ERRORS = (400, 404, 413)
_CHUNKS = (CompletionChunk, ChatCompletionChunk, GeneratedDelta, ErrorEnvelope)
_SCHEMAS = "#/components/schemas/{model}"


def errors(*statuses: int) -> Responses:
    """Errors in the one envelope."""
    return {status: {"model": ErrorEnvelope, "description": _ERRORS[status]} for status in statuses}


def guarded(answer: type[BaseModel] | None, *more: int) -> Responses:
    """Answers of a route that needs a key; None if the route's own annotation says what it answers."""
    success: Responses = {} if answer is None else {HTTPStatus.OK.value: {"model": answer}}
    return success | errors(*_GUARDED_ERRORS, *more)


def worked(answer: Any, *, chunk: type[BaseModel] | None = None) -> Responses:
    """Answers of a guarded route that takes a body, and answers as a stream if there is a `chunk`."""
    responses = guarded(answer, *_BODY_ERRORS)
    if chunk is not None:
        responses[HTTPStatus.OK.value]["content"] = {"text/event-stream": {"itemSchema": _event(chunk)}}
    return responses


def _event(chunk: type[BaseModel]) -> dict[str, Any]:
    """One server-sent event."""
    payloads = [{"$ref": _SCHEMAS.format(model=model.__name__)} for model in (chunk, ErrorEnvelope)]
    data = [
        {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": payloads}},
        {"const": "[DONE]", "description": "The last event, also behind an error"},
    ]
    return {"type": "object", "properties": {"data": {"anyOf": data}}, "required": ["data"]}


class DocumentedApp(FastAPI):
    """An application whose schema has the bounds of requests as they are.

    FastAPI's own copy of a schema rounds integers to doubles, so that 2**63 would pass for an int64, and has
    answers of status 422, which this service never gives.
    """

    def openapi(self) -> dict[str, Any]:
        """The document; made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            models = (*_REQUESTS, *_CHUNKS)
            _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_SCHEMAS)
            document["components"]["schemas"] |= schemas["$defs"]
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        assert self.openapi_schema is not None
        return self.openapi_schema
