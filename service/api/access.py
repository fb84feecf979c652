"""Who may use a route, and how much: decided when the route is known, before a byte of the body is read."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from service.api.auth import KeyRing
from service.api.errors import BodyRefused
from service.api.limits import ClientLimits
from service.api.logs import current_record
from service.errors import InvalidRequest, Misdirected, TooManyRequests
from service.metrics import Metrics

ANONYMOUS = "anonymous"
"""The one client of a service without keys."""
MAX_JSON_PARTS = 2**16
"""Lists, objects and members of one body: 50 ms of parsing, where a body of 4 MiB could take seconds."""
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # never fails, so that it is linear
_LOCAL_NAMES = ("localhost", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The rules.

    Attributes:
        keys: open the routes that do work.
        metrics_key: opens `/metrics`, which takes no other.
        limits: of each client.
        cors_origins: web pages that browsers let use the service; `*` is all.
        own_host: the only host name that requests may be for, besides `localhost`; None if any is right.
    """

    keys: KeyRing = field(default_factory=KeyRing)
    metrics_key: KeyRing = field(default_factory=KeyRing)
    limits: ClientLimits = field(default_factory=ClientLimits)
    cors_origins: tuple[str, ...] = ()
    own_host: str | None = None

    def check_host(self, headers: Headers) -> None:
        """Refuse a request that a web page made to this machine under a name of its own (DNS rebinding).

        An address is no such name.

        Raises:
            Misdirected: it is for another host.
        """
        name = _host_name(headers.get("host", ""))
        if self.own_host is None or name in (*_LOCAL_NAMES, self.own_host) or _is_address(name):
            return
        raise Misdirected(
            f"host {name[:64]!r} is not this service's; without API keys it listens to this machine, as localhost "
            "or by address; call it so, or start it with API keys",
            code="wrong_host",
        )


class GuardedRoute(APIRoute):
    """A route that does work: for clients with a key, within their limits, from JSON of bounded depth."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or raise a `RequestError` that becomes the answer."""
        access: Access = scope["app"].state.access
        metrics: Metrics = scope["app"].state.metrics
        headers = Headers(scope=scope)
        access.check_host(headers)
        client = access.keys.identify(headers)
        current_record().client = client
        try:
            with access.limits.hold(client or ANONYMOUS):
                await super().handle(scope, receive, send)
        except TooManyRequests as error:
            metrics.count_rejected(error.reason)
            raise

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What reads the body and calls the endpoint."""
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return handle_bounded


class _BoundedRequest(Request):
    """Reads JSON with a parser that takes 200 lists and objects inside each other at most, and Unicode text only."""

    async def json(self) -> Any:
        body = await self.body()
        _check_parts(body)
        try:
            return from_json(body)
        except ValueError as error:
            reason = str(error).replace("hex escape", "hex escape (half of a surrogate pair is no character)")
            raise json.JSONDecodeError(reason, "", 0) from error


def _check_parts(body: bytes) -> None:
    """Refuse JSON of so many lists, objects and members that the event loop would be busy with them for long.

    Raises:
        BodyRefused: more than `MAX_JSON_PARTS`.
    """
    if _num_marks(body) <= MAX_JSON_PARTS:
        return
    num_parts = _num_marks(_JSON_STRING.sub(b"", body))  # a text may hold as many as it likes
    if num_parts > MAX_JSON_PARTS:
        message = f"the body has {num_parts} lists, objects and members; at most {MAX_JSON_PARTS} are read; send fewer"
        raise BodyRefused(InvalidRequest(message, code="too_many_parts"))


def _num_marks(text: bytes) -> int:
    return sum(map(text.count, (b"[", b"{", b":")))


def _host_name(host: str) -> str:
    """The name in a `Host` header, without a port."""
    name, _, port = host.rpartition(":")
    return (name if port.isdigit() else host).strip("[]").rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
