"""The OpenAI error envelope on every error, whoever raised it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service.errors import (
    BodyTooLarge,
    EngineFailure,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestError,
    Unauthorized,
)

_MAX_ERRORS = 8
_MAX_FIELD_CHARACTERS = 64
_MAX_MESSAGE_CHARACTERS = 200
_MAX_VALUE_CHARACTERS = 100
_TEXT_FIELDS = frozenset({"prompt", "prompts", "messages", "content", "text", "stop", "suffix", "name"})
"""What stands there is somebody's text, and is not repeated."""
_CODES = {"extra_forbidden": "unknown_field", "missing": "missing_field", "not_supported": "not_supported"}
_MESSAGES = {
    "extra_forbidden": "unknown field; remove it",
    "missing": "is missing; send it",
}
_SUBJECT = re.compile(r"^(Input|String|Value|List) should")
_CLIENT_GONE_STATUS = 499


RECEIPT_ERROR = "receipt_error"
"""Key of an ASGI scope's `state`: the `RequestError` for which the server reads no more of a request."""


class ClientDisconnected(Exception):
    """The client has closed its connection; nobody reads an answer."""


def error_body(error: RequestError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_bytes(error: RequestError) -> bytes:
    """The envelope as ASCII JSON, so that no text of a request can break it."""
    return json.dumps(error_body(error), ensure_ascii=True).encode("ascii")


def error_headers(error: RequestError) -> dict[str, str]:
    """When a client may try again; by default the official ones retry every 408 and 5xx."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    elif error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.status == HTTPStatus.REQUEST_TIMEOUT:
        headers["x-should-retry"] = "false"
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="pennyweight"'
    if isinstance(error, BodyTooLarge):
        headers["Connection"] = "close"  # the rest of the body is not read
    return headers


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """An error as HTTP."""
    return Response(
        error_bytes(error),
        status_code=error.status,
        media_type="application/json",
        headers=error_headers(error) | dict(headers or {}),
    )


def internal_error() -> EngineFailure:
    """A defect of ours, without its text."""
    return EngineFailure("the service failed on this request; the log has the reason", code="internal_error")


def validation_error(errors: Sequence[Any]) -> InvalidRequest:
    """What a client is told about a body that does not fit its schema: field, value and rule."""
    lines = []
    for error in errors[:_MAX_ERRORS]:
        message = _MESSAGES.get(error["type"]) or _SUBJECT.sub("must", error["msg"])[:_MAX_MESSAGE_CHARACTERS]
        lines.append(f"{_field(error) or 'the body'}: {_value(error, message)}{message}")
    code = _CODES.get(errors[0]["type"], "invalid_value")
    return InvalidRequest("; ".join(lines), param=_field(errors[0]) or None, code=code)


def answer_to(error: Exception, scope: Scope) -> Response:
    """What a client is told of whatever was raised in place of an answer."""
    if isinstance(error, ClientDisconnected):
        return Response(status_code=_CLIENT_GONE_STATUS)
    if isinstance(error, HTTPException):
        return error_response(_from_http(error, scope), error.headers)
    return error_response(error if isinstance(error, RequestError) else internal_error())


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of an application an envelope."""

    async def answer(request: Request, error: Exception) -> Response:
        return answer_to(error, request.scope)

    for kind in (RequestError, HTTPException, ClientDisconnected, Exception):
        app.add_exception_handler(kind, answer)


def _from_http(error: HTTPException, scope: Scope) -> RequestError:
    """An error that the web framework raised."""
    if error.status_code == HTTPStatus.NOT_FOUND:
        path = scope["path"][:_MAX_FIELD_CHARACTERS]  # not of the URL, which a Host header can bend
        return NotFound(f"{path}: no such route; GET /openapi.json lists them", code="unknown_route")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        return MethodNotAllowed(f"this route does not take this method; use {allowed}", code="method_not_allowed")
    failure = RequestError(str(error.detail))
    failure.status = error.status_code
    return failure


def _field(error: Mapping[str, Any]) -> str:
    """Dotted name of a field; cut, as a client chose it."""
    return ".".join(str(part) for part in error["loc"])[:_MAX_FIELD_CHARACTERS]


def _value(error: Mapping[str, Any], message: str) -> str:
    """The value at fault, where its rule reads on from it; short, and no text that a client wrote for the model."""
    if not _field(error) or not message.startswith(("must", "is not supported")):
        return ""
    value = error["input"]
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind} of {len(value)} "
    if isinstance(value, str) and (len(value) > _MAX_VALUE_CHARACTERS or _TEXT_FIELDS.intersection(error["loc"][-1:])):
        return f"a text of {len(value)} characters "
    text = json.dumps(value)
    return f"{text} " if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[:_MAX_VALUE_CHARACTERS]}... "
