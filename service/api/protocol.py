"""HTTP/1.1 where bytes come in: deadlines for slow clients, a bound on connections, envelopes for what is no HTTP.

uvicorn has none of this. The subclass relies on what uvicorn 0.54 does not document: the methods that it
overrides here, `_unset_keepalive_if_required`, `conn`, `cycle`, `scope`, `app_state`, `connections`, `transport` and
`loop`, and that `send_400_response` is called where h11's error is being handled. `tests/api/test_protocol.py` fails
if that changes.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from service.api.errors import RECEIPT_ERROR, error_response
from service.api.middleware import SECURITY_HEADERS
from service.errors import MalformedHttp, RequestError, RequestTimedOut, Unavailable
from service.metrics import Metrics

logger = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 16384
"""Where the configuration does not say."""
_LINGER_S = 2.0
"""How long what a client still sends is read and dropped behind an error: a reset would take the answer from it."""
_CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"
_SMUGGLING_HEADERS = {b"content-length", b"transfer-encoding"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What a client may take.

    Attributes:
        receive_timeout_s: from the first byte of a request, or from the beginning of a connection, to the last byte.
        send_timeout_s: for which written data may lie here because the client does not read it.
        max_connections: more are answered 503, but for the probes; twice as many are cut.
    """

    receive_timeout_s: float
    send_timeout_s: float
    max_connections: int


class LeanConnection(h11.Connection):
    """Writes less often than h11, and the chunks of a stream without its bookkeeping, which they do not change."""

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self._head = b""
        self._is_chunked = False

    def send(self, event: h11.Event) -> bytes:  # type: ignore[override]  # as h11 says of all events but one
        """What an event is on the wire; the head of a response goes with what comes next, which is there already."""
        if self._is_chunked and isinstance(event, h11.Data) and self.our_state is h11.SEND_BODY:
            data = b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        else:
            data = super().send(event) or b""
            self._is_chunked = isinstance(event, h11.Response) and _CHUNKED in data.lower()
        if isinstance(event, h11.Response):
            self._head = data
            return b""
        head, self._head = self._head, b""
        return head + data


class EdgeProtocol(H11Protocol):
    """One connection.

    A request that does not arrive as it should, after its headers, is answered by the application, which finds
    the error as `scope["state"][RECEIPT_ERROR]`; before that it is answered here.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
        metrics: Metrics,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = LeanConnection(config.h11_max_incomplete_event_size or _MAX_HEAD_BYTES)
        self._limits = limits
        self._metrics = metrics
        self._receipt_timer: asyncio.TimerHandle | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        # Whatever the kernel does not take at once calls `pause_writing`, so that each write has its deadline.
        transport.set_write_buffer_limits(high=0)
        num_connections, most = len(self.connections), self._limits.max_connections
        if num_connections > 2 * most:
            self._metrics.count_rejected("connection_limit")
            transport.abort()
            return
        if num_connections > most:
            message = f"{most} connections are open, all that this service takes; retry later"
            self.app_state = self.app_state | {RECEIPT_ERROR: Unavailable(message, code="too_many_connections")}
        self._await_receipt()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        self._end_receipt()
        self._end_abort()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn lets it hold what is left of a connection that was reset

    def data_received(self, data: bytes) -> None:
        """Read on; a request has its deadline from its first byte, and no further byte moves it."""
        if self._is_refused:
            return
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._await_receipt()
        super().data_received(data)

    def handle_events(self) -> None:
        """Handle what has been received; also called when a response is complete and the next request may be there."""
        scope, state = self.scope, self.conn.their_state
        super().handle_events()
        if self.scope is not scope and {name for name, _ in self.headers} >= _SMUGGLING_HEADERS:
            error = MalformedHttp("the request has both Content-Length and Transfer-Encoding; send one of them")
            self.scope["state"][RECEIPT_ERROR] = error
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._end_receipt()
        elif (state, self.conn.their_state) == (h11.SEND_BODY, h11.IDLE):  # answered before it was all there
            self._end_receipt()
            self._await_receipt()

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 has refused."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else HTTPStatus.BAD_REQUEST
        reason = str(error or msg).partition(": bytearray")[0]  # without what the client sent
        message = f"this is no valid HTTP request ({reason}); correct it"
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            message = f"the headers have more than {self.config.h11_max_incomplete_event_size} bytes; send less"
        self._refuse(MalformedHttp(message, status=status))

    def pause_writing(self) -> None:
        """Give the client time to read."""
        super().pause_writing()
        self._abort_after(self._limits.send_timeout_s)

    def resume_writing(self) -> None:
        """All was taken."""
        super().resume_writing()
        self._end_abort()

    def _await_receipt(self) -> None:
        if self._receipt_timer is None:
            self._receipt_timer = self.loop.call_later(self._limits.receive_timeout_s, self._receive_no_longer)

    def _end_receipt(self) -> None:
        if self._receipt_timer is not None:
            self._receipt_timer.cancel()
            self._receipt_timer = None

    def _receive_no_longer(self) -> None:
        self._receipt_timer = None
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # nothing was asked
            return
        limit_s = self._limits.receive_timeout_s
        message = f"the request did not arrive within {limit_s:g} s; send it faster, or raise --receive-timeout"
        self._refuse(RequestTimedOut(message, code="receive_timeout"))

    def _refuse(self, error: RequestError) -> None:
        """Answer an error in place of a request, or let the application do so, and read nothing more."""
        self._is_refused = True
        if self.conn.our_state is h11.SEND_RESPONSE:
            self.cycle.scope["state"][RECEIPT_ERROR] = error
            self.cycle.keep_alive = False
            self.cycle.message_event.set()
            return
        if self.conn.our_state is h11.SEND_BODY:
            self.transport.abort()
            return
        if self.conn.our_state is h11.IDLE:
            self._answer(error)
        self._linger()

    def _answer(self, error: RequestError) -> None:
        request_id = uuid.uuid4().hex
        response = error_response(error, {**SECURITY_HEADERS, "Connection": "close", "X-Request-ID": request_id})
        headers = [*self.server_state.default_headers, *response.raw_headers]
        reason = HTTPStatus(error.status).phrase.encode("ascii")
        head = h11.Response(status_code=error.status, headers=headers, reason=reason)
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._metrics.count_request("unknown", error.status)
        logger.info("refused %d: %s", error.status, error.message, extra={"request_id": request_id})

    def _linger(self) -> None:
        """Close in the direction of the client, and soon altogether."""
        self.transport.write_eof()
        self._abort_after(_LINGER_S)

    def _abort_after(self, seconds: float) -> None:
        self._end_abort()
        self._abort_timer = self.loop.call_later(seconds, self._abort)

    def _end_abort(self) -> None:
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None

    def _abort(self) -> None:
        if not self._is_refused:
            logger.info("a client did not read for %g s; its connection was closed", self._limits.send_timeout_s)
        self.transport.abort()
