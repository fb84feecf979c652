"""From the body of a request to its fields: JSON of bounded depth and size, checked against a schema."""

from __future__ import annotations

import re
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from service.api.errors import ClientDisconnected, validation_error
from service.errors import InvalidRequest

MAX_JSON_PARTS = 2**16
"""Lists, objects and members of one body: 50 ms of parsing, where a body of 4 MiB could take seconds."""
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # never fails, so that it is linear
_MEDIA_TYPE = re.compile(r"application/(?:[^/]+\+)?json")
_MAX_SHOWN_CHARACTERS = 64
_MAX_REASON_CHARACTERS = 200

Fields = TypeVar("Fields", bound=BaseModel)


async def read_fields(request: Request, schema: type[Fields]) -> Fields:
    """The fields that a request has sent, as JSON in its body.

    The parser takes 200 lists and objects inside each other at most, and Unicode text only.

    Raises:
        ClientDisconnected: the client has left in the middle of it.
        InvalidRequest: another media type, no JSON, or not as the schema says.
    """
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientDisconnected from None
    _check_media_type(request.headers.get("content-type"))
    if not body:
        raise InvalidRequest("the body: is missing; send it", code="missing_field")
    _check_parts(body)
    try:
        value = from_json(body)
    except ValueError as error:
        reason = str(error).replace("hex escape", "hex escape (half of a surrogate pair is no character)")
        message = f"the body is not valid JSON: {reason[:_MAX_REASON_CHARACTERS]}; correct it"
        raise InvalidRequest(message, code="invalid_json") from error
    try:
        return schema.model_validate(value, from_attributes=True)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False)) from error


def _check_media_type(content_type: str | None) -> None:
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if _MEDIA_TYPE.fullmatch(media_type):
        return
    given = "no Content-Type" if content_type is None else f"Content-Type {media_type[:_MAX_SHOWN_CHARACTERS]!r}"
    raise InvalidRequest(
        f"the body has {given}; it must be JSON; send the header Content-Type: application/json",
        code="invalid_content_type",
    )


def _check_parts(body: bytes) -> None:
    """Refuse JSON of so many lists, objects and members that the event loop would be busy with them for long."""
    if _num_marks(body) <= MAX_JSON_PARTS:
        return
    num_parts = _num_marks(_JSON_STRING.sub(b"", body))  # a text may hold as many as it likes
    if num_parts > MAX_JSON_PARTS:
        message = f"the body has {num_parts} lists, objects and members; at most {MAX_JSON_PARTS} are read; send fewer"
        raise InvalidRequest(message, code="too_many_parts")


def _num_marks(text: bytes) -> int:
    return sum(map(text.count, (b"[", b"{", b":")))
