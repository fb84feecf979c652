"""What holds for every request, before any route: its id, its size, its line in the log, its count."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import BodyLimitExceeded, error_response
from service.api.logs import REQUEST_ID
from service.errors import BodyTooLarge
from service.metrics import Metrics

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})
_MAX_DISCARDED_RATIO = 4
_MAX_DISCARD_S = 2.0
_NO_STATUS = 499
"""Counted for a request whose client left before an answer."""


class RequestMiddleware:
    """Outermost ASGI layer, so that answers of the framework itself pass through it as well.

    Args:
        max_body_bytes: longer bodies get 413 and are never parsed.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if _SANE_ID.fullmatch(sent_id) else uuid.uuid4().hex
        token = REQUEST_ID.set(request_id)
        started = time.monotonic()
        status = _NO_STATUS

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            limit = self._max_body_bytes
            if _content_length(headers) > limit:
                if "expect" not in headers:  # such a client waits for leave to send
                    await _discard(receive, limit)
                await error_response(_too_large(limit))(scope, receive, send_with_id)
            else:
                await self._app(scope, _limited(receive, limit), send_with_id)
        finally:
            self._finish(scope, status, time.monotonic() - started)
            REQUEST_ID.reset(token)

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        route = str(getattr(scope.get("route"), "path", "unknown"))
        self._metrics.requests.labels(route=route, status=str(status)).inc()
        if route not in _QUIET_ROUTES:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            logger.info("%s %s %d %.3f s", method, route, status, seconds)


def _limited(receive: Receive, limit: int) -> Receive:
    """Count the bytes of a body that did not state its length."""
    num_bytes = 0

    async def receive_limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > limit:
            if message.get("more_body", False):
                await _discard(receive, limit)
            raise BodyLimitExceeded(_too_large(limit))
        return message

    return receive_limited


async def _discard(receive: Receive, limit: int) -> None:
    """Read on a little: a client that is still sending when the connection closes never sees the answer."""
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_MAX_DISCARD_S):
            while num_bytes <= _MAX_DISCARDED_RATIO * limit:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _content_length(headers: Headers) -> int:
    """The stated length; 0 if there is none. The HTTP parser has refused what is no number."""
    return int(headers.get("content-length", "0"))


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body has more than {limit} bytes, the limit; send less, or raise --max-body-bytes", code="body_too_large"
    )
