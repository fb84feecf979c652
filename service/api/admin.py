"""What operators and clients ask besides text: models, the load report, probes, metrics, version."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Security
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse, Response

from service import __version__
from service.api.access import Access
from service.api.answers import Alive, Build, ModelCard, ModelList, Readiness
from service.api.errors import error_body, error_headers, error_response
from service.api.openapi import SECURITY_SCHEMES, Responses, errors, guarded
from service.api.routes import GuardedRoute, PlainRoute
from service.api.state import ServiceState
from service.errors import Unavailable
from service.loading.progress import Phase


def admin_router(state: ServiceState) -> APIRouter:
    """What clients ask about the model."""
    router = APIRouter(route_class=GuardedRoute)
    _add_model_routes(router, state)
    return router


def probe_router(state: ServiceState, access: Access) -> APIRouter:
    """What machines and operators ask, without a key of a client."""
    router = APIRouter()
    _add_probe_routes(router, state)

    async def metrics(request: Request) -> Response:
        """Prometheus text."""
        access.check_host(request.headers)
        access.metrics_key.identify(request.headers)
        return Response(state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    router.add_api_route(
        "/metrics",
        metrics,
        methods=["GET"],
        response_class=PlainTextResponse,
        dependencies=[Security(scheme) for scheme in SECURITY_SCHEMES] if access.metrics_key else [],
        responses=errors(401, 421),
        route_class_override=PlainRoute,
    )

    @router.get("/version", response_model=None, responses={200: {"model": Build}})
    async def build() -> dict[str, str]:
        """Version and build."""
        return {"version": __version__, "python": platform.python_version(), "torch": version("torch")}

    return router


def _add_model_routes(router: APIRouter, state: ServiceState) -> None:
    @router.get("/v1/models", response_model=None, responses=guarded(ModelList))
    async def list_models() -> dict[str, Any]:
        """The one model, also while it loads."""
        return {"object": "list", "data": [_model(state)]}

    @router.get("/v1/models/{model_id:path}", response_model=None, responses=guarded(ModelCard, 404))
    async def get_model(model_id: str) -> dict[str, Any]:
        """The model, by its name."""
        state.check_model(model_id)
        return _model(state)

    @router.get("/v1/quantization", responses=guarded(None))
    async def get_quantization() -> dict[str, Any]:
        """The load report."""
        if state.served is None:
            raise Unavailable("there is no load report before the model is loaded; retry later", code=str(state.phase))
        report = state.served.report
        weight_bytes = asdict(report.weight_bytes) | {"total": report.weight_bytes.total}
        derived = {
            "saving_ratio": report.saving_ratio,
            "bits_per_parameter": report.bits_per_parameter,
            "system_fingerprint": report.fingerprint,
        }
        fidelity = {"fidelity": state.served.fidelity().to_dict()}
        return {"model": state.model_name} | asdict(report) | {"weight_bytes": weight_bytes} | derived | fidelity


def _add_probe_routes(router: APIRouter, state: ServiceState) -> None:
    @router.get("/livez", response_model=None, responses=errors(503) | {200: {"model": Alive}})
    async def livez() -> Response:
        """200 while the process makes progress, also while it loads and drains."""
        if state.served is not None and state.phase is Phase.FAILED:
            return error_response(state.not_ready())
        limit_s = state.passed_limit_s()
        if limit_s is not None:
            error = Unavailable(
                f"requests are open and no step was finished for {limit_s:.3g} s, longer than this model's steps take; "
                "restart the service",
                code="stalled",
            )
            return error_response(error)
        return JSONResponse({"status": "ok"})

    phases: Responses = {status: {"model": Readiness} for status in (200, 503)}

    @router.get("/readyz", response_model=None, responses=phases)
    async def readyz() -> Response:
        """200 if it can serve, else 503 and how far it has come."""
        progress = state.progress.snapshot()
        phase = state.phase
        left_s = None if progress.remaining_s is None else round(progress.remaining_s, 3)
        body = progress._asdict() | {
            "phase": str(phase),
            "elapsed_s": round(progress.elapsed_s, 3),
            "remaining_s": left_s,
        }
        if phase is Phase.READY:
            return JSONResponse(body)
        error = state.not_ready()
        return JSONResponse(body | error_body(error), error.status, error_headers(error))


def _model(state: ServiceState) -> dict[str, Any]:
    """One model in OpenAI's form; what is not known while it loads is null."""
    served = state.served
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "pennyweight",
        "max_model_len": None if served is None else served.max_model_len,
        "scheme": state.scheme,
        "has_chat_template": None if served is None else served.chat_template is not None,
        "sampling_defaults": None if served is None else asdict(served.sampling_defaults),
    }
