"""`GET /docs`: the schema as a page to try it from; off by default, as its scripts come from a public network."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

_SOURCE = "https://cdn.jsdelivr.net"
_POLICY = (
    f"default-src 'none'; script-src {_SOURCE} 'unsafe-inline'; style-src {_SOURCE}; img-src data:; "
    "connect-src 'self'; frame-ancestors 'none'"
)


def docs_router() -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """The page."""
        page = get_swagger_ui_html(openapi_url="/openapi.json", title="Pennyweight", swagger_favicon_url="data:,")
        page.headers["Content-Security-Policy"] = _POLICY
        return page

    return router
