"""What becomes of a defect in a route that answers without the layers of the framework."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from service.api.access import Access
from service.api.errors import ClientDisconnected, install_error_handlers
from service.api.middleware import RequestMiddleware
from service.api.routes import DirectRoutes, JsonRoute
from service.api.state import ServiceState
from service.api.streams import EventRouter
from service.errors import NotFound
from service.loading.progress import LoadProgress
from service.metrics import Metrics
from tests.api.support import assert_error

ERRORS = {"defect": ValueError("/secret/path"), "missing": NotFound("no such thing", code="none"), "gone": None}


class Fields(BaseModel):
    """Of the route."""

    what: str


def _router() -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/work")
    async def work(body: Fields) -> Response:
        if body.what in ERRORS:
            raise ERRORS[body.what] or ClientDisconnected
        return JSONResponse({"what": body.what})

    return router


async def _post(what: str, path: str, *, raise_defects: bool) -> tuple[httpx.Response, Metrics]:
    """What a client gets of the route, past the framework or by way of it."""
    metrics = Metrics(LoadProgress(), model="m", scheme="none", device="cpu")
    app, router = FastAPI(), _router()
    app.include_router(router)
    install_error_handlers(app)
    app.state.access = Access()
    app.state.service = ServiceState(
        model_name="m", scheme="none", metrics=metrics, router=EventRouter(asyncio.get_running_loop())
    )
    routes = [route for route in router.routes if isinstance(route, JsonRoute)]
    outer = RequestMiddleware(DirectRoutes(app, routes), metrics=metrics, max_body_bytes=1000)
    transport = httpx.ASGITransport(outer, raise_app_exceptions=raise_defects)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, json={"what": what}), metrics


def test_a_direct_route_answers_and_is_counted_by_its_name() -> None:
    answer, metrics = asyncio.run(_post("this", "/work", raise_defects=True))
    assert answer.json() == {"what": "this"}
    assert re.search(r'requests_total\{.*route="/work".*status="200".*\} 1$', metrics.text(), re.MULTILINE)


def test_a_defect_is_500_without_its_text_and_the_server_hears_of_it() -> None:
    answer, _ = asyncio.run(_post("defect", "/work", raise_defects=False))
    assert_error(answer, 500, param=None, code="internal_error", message="the service failed on this request")
    assert "secret" not in answer.text
    with pytest.raises(ValueError, match="/secret/path"):
        asyncio.run(_post("defect", "/work", raise_defects=True))


def test_a_refusal_is_no_defect() -> None:
    answer, _ = asyncio.run(_post("missing", "/work", raise_defects=True))
    assert_error(answer, 404, param=None, code="none", message="no such thing")


def test_a_client_that_has_left_is_no_defect() -> None:
    answer, _ = asyncio.run(_post("gone", "/work", raise_defects=True))
    assert answer.status_code == 499


def test_another_path_is_left_to_the_application() -> None:
    answer, _ = asyncio.run(_post("this", "/works", raise_defects=True))
    assert_error(answer, 404, param=None, code="unknown_route", message="/works: no such route")
