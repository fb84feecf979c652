"""Which web pages browsers let use the service: none, unless an operator names them."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from service.api.errors import error_response
from service.errors import InvalidRequest

_METHODS = ("GET", "POST")
_EXPOSED_HEADERS = ("X-Request-ID", "Retry-After", "x-should-retry")


class CorsMiddleware(CORSMiddleware):
    """The library's, for keys in headers and without cookies; a refused preflight is an error like all others."""

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        # Clients in browsers send headers of their own; what a page may not do it may not do with them either.
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            expose_headers=_EXPOSED_HEADERS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """What a browser is told before it sends what a page asked for."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        error = InvalidRequest(
            "a page of this origin may not send this request; --cors-origin names the origins that may, "
            f"with {' and '.join(_METHODS)}",
            code="cors",
        )
        kept = ("vary", "access-control-allow-origin")
        return error_response(error, {name: response.headers[name] for name in kept if name in response.headers})
