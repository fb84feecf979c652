"""Answers as JSON; long ones without keeping the other threads of the process waiting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

_MOST_AT_ONCE = 512
"""Items of a list that are written at once: nothing else in the process runs meanwhile, some milliseconds."""

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_encode_unicode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode


def write_json(value: Any) -> str:
    """As `json.dumps` writes it without blanks; of long lists so many items at once."""
    if isinstance(value, dict):
        items = (f"{_encode(name)}:{write_json(item)}" for name, item in value.items())
        return f"{{{','.join(items)}}}"
    if not isinstance(value, list):
        return _encode(value)
    if len(value) <= _MOST_AT_ONCE:
        return f"[{','.join(map(write_json, value))}]"
    parts = (value[start : start + _MOST_AT_ONCE] for start in range(0, len(value), _MOST_AT_ONCE))
    return f"[{','.join(_encode(part)[1:-1] for part in parts)}]"


def json_response(content: dict[str, Any]) -> Response:
    """A short answer; the encoder is ready, where Starlette's response makes one each time."""
    return Response(_encode_unicode(content).encode(), media_type="application/json")


async def long_response(make: Callable[[], dict[str, Any]]) -> Response:
    """The answer that `make` puts together; off the event loop."""
    content = await asyncio.to_thread(lambda: write_json(make()).encode("ascii"))
    return Response(content, media_type="application/json")
