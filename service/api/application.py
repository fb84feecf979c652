"""The application factory: all routes around one `ServiceState`, to run under any ASGI server."""

from __future__ import annotations

from fastapi import Security
from starlette.types import ASGIApp

from service import __version__
from service.api.access import Access
from service.api.admin import admin_router, probe_router
from service.api.chat import chat_router
from service.api.completions import completions_router
from service.api.cors import CorsMiddleware
from service.api.docs import docs_router
from service.api.errors import install_error_handlers
from service.api.generate import generate_router
from service.api.middleware import RequestMiddleware
from service.api.openapi import SECURITY_SCHEMES, DocumentedApp
from service.api.page import page_router
from service.api.routes import DirectRoutes, JsonRoute
from service.api.state import ServiceState
from service.api.tokenization import tokenization_router
from service.loading.progress import Phase

_GUARDED = (completions_router, chat_router, generate_router, tokenization_router, admin_router)


def create_application(
    state: ServiceState,
    *,
    max_body_bytes: int,
    access: Access | None = None,
    with_docs: bool = False,
    twin: str | None = None,
) -> ASGIApp:
    """Build the ASGI application; it answers at once, whatever `state` has to offer yet.

    Without `access` everybody may use every route. The page compares with the service of the origin `twin`.
    """
    access = access or Access()
    app = DocumentedApp(title="Pennyweight", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.access, app.state.service = access, state
    install_error_handlers(app)
    schemes = [Security(scheme) for scheme in SECURITY_SCHEMES] if access.keys else []
    routers = [make_router(state) for make_router in _GUARDED]
    for router in routers:
        app.include_router(router, dependencies=schemes)
    app.include_router(probe_router(state, access))
    app.include_router(page_router(twin))
    if with_docs:
        app.include_router(docs_router())
    routes = [route for router in routers for route in router.routes if isinstance(route, JsonRoute)]
    inner: ASGIApp = DirectRoutes(app, routes)
    if access.cors_origins:
        inner = CorsMiddleware(inner, origins=access.cors_origins)
    return RequestMiddleware(
        inner,
        metrics=state.metrics,
        max_body_bytes=max_body_bytes,
        is_closing=lambda: state.progress.phase is Phase.DRAINING,
    )
