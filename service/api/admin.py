"""What operators and clients ask besides text: models, the load report, probes, metrics, version."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from service import __version__
from service.api.errors import error_body, error_headers, error_response
from service.api.state import STALL_LIMIT_S, ServiceState
from service.errors import Unavailable
from service.loading.progress import Phase


def admin_router(state: ServiceState) -> APIRouter:
    """All routes that generate nothing."""
    router = APIRouter()
    _add_model_routes(router, state)
    _add_probe_routes(router, state)

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version")
    async def build() -> dict[str, str]:
        """Version and build."""
        return {"version": __version__, "python": platform.python_version(), "torch": version("torch")}

    return router


def _add_model_routes(router: APIRouter, state: ServiceState) -> None:
    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The one model, also while it loads."""
        return {"object": "list", "data": [_model(state)]}

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        """The model, by its name."""
        state.check_model(model_id)
        return _model(state)

    @router.get("/v1/quantization")
    async def get_quantization() -> dict[str, Any]:
        """The load report."""
        if state.served is None:
            raise Unavailable("there is no load report before the model is loaded; retry later", code=str(state.phase))
        report = state.served.report
        weight_bytes = asdict(report.weight_bytes) | {"total": report.weight_bytes.total}
        derived = {"saving_ratio": report.saving_ratio, "bits_per_parameter": report.bits_per_parameter}
        return {"model": state.model_name} | asdict(report) | {"weight_bytes": weight_bytes} | derived


def _add_probe_routes(router: APIRouter, state: ServiceState) -> None:
    @router.get("/livez", response_model=None)
    async def livez() -> Response:
        """200 while the process makes progress, also while it loads and drains."""
        if state.served is not None and state.phase is Phase.FAILED:
            return error_response(state.not_ready())
        if state.is_stalled():
            error = Unavailable(
                f"requests are open and no step was finished for {STALL_LIMIT_S:.0f} s; restart the service",
                code="stalled",
            )
            return error_response(error)
        return JSONResponse({"status": "ok"})

    @router.get("/readyz", response_model=None)
    async def readyz() -> Response:
        """200 if it can serve, else 503 and how far it has come."""
        progress = state.progress.snapshot()
        phase = state.phase
        body = progress._asdict() | {"phase": str(phase), "elapsed_s": round(progress.elapsed_s, 3)}
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
