"""The application factory: all routes around one `ServiceState`, to run under any ASGI server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from service import __version__
from service.api.admin import admin_router
from service.api.chat import chat_router
from service.api.completions import completions_router
from service.api.errors import install_error_handlers
from service.api.generate import generate_router
from service.api.middleware import RequestMiddleware
from service.api.schemas import ErrorEnvelope
from service.api.state import ServiceState
from service.api.tokenization import tokenization_router


def create_application(state: ServiceState, *, max_body_bytes: int) -> ASGIApp:
    """Build the ASGI application; it answers at once, whatever `state` has to offer yet."""
    errors: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorEnvelope, "description": "Any error"}}
    app = FastAPI(title="Pennyweight", version=__version__, docs_url=None, redoc_url=None, responses=errors)
    install_error_handlers(app)
    for make_router in (completions_router, chat_router, generate_router, tokenization_router, admin_router):
        app.include_router(make_router(state))
    return RequestMiddleware(app, metrics=state.metrics, max_body_bytes=max_body_bytes)
