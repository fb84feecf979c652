"""Routes that do work: for clients with a key, within their limits, while there is room.

That is decided before a byte of the body is read. The routes that take JSON need nothing of the web framework but
their place in its schema: its layers around an endpoint take longer than all else that HTTP does with a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.access import Access
from service.api.bodies import read_fields
from service.api.errors import ClientDisconnected, answer_to
from service.api.logs import current_record
from service.api.state import ServiceState
from service.errors import RequestError, TooManyRequests

ANONYMOUS = "anonymous"
"""The one client of a service without keys."""
_METHOD = "POST"
"""Of all routes that take JSON."""


class GuardedRoute(APIRoute):
    """A route of an application whose `state` has the `access` and the `service`."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or raise a `RequestError` that becomes the answer."""
        access: Access = scope["app"].state.access
        service: ServiceState = scope["app"].state.service
        headers = Headers(scope=scope)
        access.check_host(headers)
        client = access.keys.identify(headers)
        current_record().client = client
        try:
            with access.limits.hold(client or ANONYMOUS):
                await self.work(service, scope, receive, send)
        except TooManyRequests as error:
            service.metrics.count_rejected(error.reason)
            raise

    async def work(self, service: ServiceState, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a client that may ask."""
        await super().handle(scope, receive, send)


class PlainRoute(APIRoute):
    """Its endpoint takes the request and gives the response, and needs nothing of the layers around an endpoint."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every route, which refuses other methods."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        response: Response = await self.endpoint(Request(scope, receive))
        await response(scope, receive, send)


class JsonRoute(GuardedRoute):
    """Its endpoint takes what the body holds as `body`, and the request as `request` if it likes."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        hints = get_type_hints(endpoint)
        self._schema = hints["body"]
        self._wants_request = "request" in hints

    async def work(self, service: ServiceState, scope: Scope, receive: Receive, send: Send) -> None:
        """As every route, which refuses other methods."""
        if scope["method"] != _METHOD:
            await super().work(service, scope, receive, send)
            return
        request = Request(scope, receive)
        fields = await read_fields(request, self._schema)
        response = await (self.endpoint(fields, request) if self._wants_request else self.endpoint(fields))
        await response(scope, receive, send)


class GenerationRoute(JsonRoute):
    """Its work waits in the queue: while that is full a request costs next to nothing, whatever it holds."""

    async def work(self, service: ServiceState, scope: Scope, receive: Receive, send: Send) -> None:
        """As every route, if the queue has room."""
        service.check_room()
        await super().work(service, scope, receive, send)


class DirectRoutes:
    """Finds routes that take JSON by their path, and leaves all else to the application that they are part of."""

    def __init__(self, app: FastAPI, routes: Iterable[JsonRoute]) -> None:
        self._app = app
        self._routes = {route.path: route for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as the application would."""
        route = self._routes.get(scope["path"]) if scope.get("method") == _METHOD else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["app"], scope["route"] = self._app, route
        try:
            await route.handle(scope, receive, send)
        except Exception as error:
            await answer_to(error, scope)(scope, receive, send)
            if not isinstance(error, RequestError | ClientDisconnected):
                raise  # the server logs it
