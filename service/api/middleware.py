"""What holds for every request, whatever its route: its id, its size, its headers, its line in the log, its count."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import RECEIPT_ERROR, error_response
from service.api.logs import REQUEST_ID, RequestRecord, new_record
from service.errors import BodyTooLarge, RequestError, Unavailable
from service.metrics import Metrics

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})
_PROBES = frozenset({"/livez", "/readyz"})
"""Answered also on a connection that is one too many."""
_MAX_DISCARDED_RATIO = 4
_MAX_DISCARD_S = 2.0
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""On every answer that does not say something else: none of them is a page, a frame, a script or for a cache."""
_SECURITY_HEADERS = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in SECURITY_HEADERS.items()]
_MAX_BODIES = 64
"""Longest bodies whose bytes are held at once, of all requests together."""
_NO_STATUS = 499
"""Counted for a request whose client left before an answer."""


class RequestMiddleware:
    """Outermost ASGI layer, so that answers of the framework itself pass through it as well.

    Args:
        max_body_bytes: longer bodies get 413 and are never parsed.
        is_closing: whether connections are closed behind their answer, as the service drains.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int, is_closing: Callable[[], bool] = lambda: False
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._is_closing = is_closing
        self._held = _Held(_MAX_BODIES * max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if _SANE_ID.fullmatch(sent_id) else secrets.token_hex(16)
        token = REQUEST_ID.set(request_id)
        record = new_record()
        started = time.monotonic()
        body = _Body(receive, scope, self._max_body_bytes, self._held)
        status = _NO_STATUS

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = message.get("headers", ())
                names = {name for name, _ in given}
                more = [(b"x-request-id", request_id.encode("ascii"))]
                more.extend(header for header in _SECURITY_HEADERS if header[0] not in names)
                if (body.is_left_unread or self._is_closing()) and b"connection" not in names:
                    more.append((b"connection", b"close"))
                message["headers"] = [*given, *more]
            await send(message)

        try:
            if (error := _receipt_error(scope)) is not None and scope["path"] not in _PROBES:
                if isinstance(error, Unavailable):  # the connection is one too many
                    self._metrics.count_rejected("connection_limit")
                await error_response(error)(scope, body.receive, send_with_headers)
            else:
                await self._app(scope, body.receive, send_with_headers)
        finally:
            body.release()
            self._finish(scope, record, status=status, seconds=time.monotonic() - started)
            REQUEST_ID.reset(token)

    def _finish(self, scope: Scope, record: RequestRecord, *, status: int, seconds: float) -> None:
        route = str(getattr(scope.get("route"), "path", "unknown"))
        self._metrics.count_request(route, status)
        if route in _QUIET_ROUTES:
            return
        method = scope["method"] if scope["method"] in _METHODS else "other"
        details = record.fields()
        text = "".join(f", {name} {value}" for name, value in details.items())
        fields = {"method": method, "route": route, "status": status, "seconds": round(seconds, 6)} | details
        logger.info("%s %s %d %.3f s%s", method, route, status, seconds, text, extra={"fields": fields})


class _Held:
    """Bytes of the bodies of all requests that are not answered, and how many there may be."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_bytes = 0


class _Body:
    """The body of a request, no longer than the limit; asked for it, one that is longer is 413.

    Until then nothing of it is read, so that a request that is refused for another reason costs nothing.
    """

    def __init__(self, receive: Receive, scope: Scope, limit: int, held: _Held) -> None:
        headers = Headers(scope=scope)
        self._receive = receive
        self._scope = scope
        self._limit = limit
        self._held = held
        self._num_bytes = 0
        self._is_expected = "expect" in headers
        # The HTTP parser has refused what is no number.
        self._is_too_long = int(headers.get("content-length", "0")) > limit

    @property
    def is_left_unread(self) -> bool:
        """Whether more is on its way than will be read."""
        return self._is_too_long or _receipt_error(self._scope) is not None

    async def receive(self) -> Message:
        """The next part.

        Raises:
            RequestError: it is too long, by its stated length or by what has come, or the server reads no more of it.
        """
        if self._is_too_long:
            if not self._is_expected:  # else the client waits for leave to send
                await _discard(self._receive, self._limit)
            raise _too_large(self._limit)
        message = await self._receive()
        if (error := _receipt_error(self._scope)) is not None:
            raise error
        self._num_bytes += len(message.get("body", b""))
        self._held.num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._limit:
            self._is_too_long = True
            if message.get("more_body", False):
                await _discard(self._receive, self._limit)
            raise _too_large(self._limit)
        if self._held.num_bytes > self._held.limit:
            self._is_too_long = True  # no more of it is read
            raise _too_many(self._held.limit)
        return message

    def release(self) -> None:
        """The request is answered, and its bytes are gone."""
        self._held.num_bytes -= self._num_bytes


def _receipt_error(scope: Scope) -> RequestError | None:
    error: RequestError | None = scope.get("state", {}).get(RECEIPT_ERROR)
    return error


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


def _too_many(limit: int) -> Unavailable:
    return Unavailable(f"the bodies of requests hold {limit} bytes, the limit; retry later", code="overloaded")


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body has more than {limit} bytes, the limit; send less, or raise --max-body-bytes", code="body_too_large"
    )
