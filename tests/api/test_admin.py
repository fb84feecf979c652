"""Models, load report, probes, metrics and version, on a service that is ready."""

from __future__ import annotations

import math
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

import service
from service.api.state import EngineHandle
from service.engine.stats import EngineState
from tests.api.support import RunningService, assert_error, eventually, sse_events
from tests.conftest import Gate
from tests.models import BLOCK_TOKEN_ID, CONTEXT


def test_the_model_is_listed_and_found_by_its_name(running: RunningService) -> None:
    listed = running.client.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"], model["scheme"]) == ("tiny", "model", CONTEXT, "none")
    assert running.client.get("/v1/models/tiny").json() == model


@pytest.mark.parametrize("name", ["other", "org/other", "tiny/"])
def test_another_model_is_404(running: RunningService, name: str) -> None:
    response = running.client.get(f"/v1/models/{name}")
    assert_error(response, 404, param="model", code="model_not_found", message="is not served here")


def test_the_load_report_shows_bytes_and_layers(running: RunningService) -> None:
    report = running.client.get("/v1/quantization").json()
    assert report["recipe"] == report["scheme"] == "none"
    assert report["weight_bytes"]["total"] == report["original_bytes"] == 4 * report["num_parameters"]
    assert report["saving_ratio"] == 0
    assert report["bits_per_parameter"] == 32
    assert {"name", "shape", "scheme", "reason", "bytes", "bits_per_weight", "relative_error", "sqnr_db"} == set(
        report["layers"][0]
    )


def _streamed(service: RunningService, path: str, body: dict[str, Any]) -> list[Any]:
    return sse_events(service.client.post(path, json=body | {"stream": True}).text)


def test_answers_of_openais_routes_name_scheme_and_weights(running: RunningService, chat: RunningService) -> None:
    prompt: dict[str, Any] = {"prompt": "The sea", "max_tokens": 2}
    messages: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for asked, path, body in (
        (running, "/v1/completions", prompt),
        (chat, "/v1/completions", prompt),
        (chat, "/v1/chat/completions", messages),
    ):
        fingerprint = asked.client.get("/v1/quantization").json()["system_fingerprint"]
        assert re.fullmatch("none-[0-9a-f]{12}", fingerprint)
        answers = [asked.client.post(path, json=body).json(), *_streamed(asked, path, body)]
        assert len(answers) > 1
        assert {answer["system_fingerprint"] for answer in answers} == {fingerprint}
    names = {asked.client.get("/v1/quantization").json()["system_fingerprint"] for asked in (running, chat)}
    assert len(names) == 2


def test_a_ready_service_is_live_and_ready(running: RunningService) -> None:
    assert running.client.get("/livez").status_code == 200
    ready = running.client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["phase"] == "ready"


def test_version_names_the_build(running: RunningService) -> None:
    answer = running.client.get("/version").json()
    assert (answer["version"], answer["python"]) == (service.__version__, platform.python_version())


def test_the_schema_has_all_routes_and_none_that_is_not_built(running: RunningService) -> None:
    paths = running.client.get("/openapi.json").json()["paths"]
    assert all("422" not in operation["responses"] for path in paths.values() for operation in path.values())
    assert set(paths) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
        "/generate",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/quantization",
        "/livez",
        "/readyz",
        "/metrics",
        "/version",
    }


class FastEngine:
    """The engine, as that of a model whose steps never take longer than 50 ms."""

    def __init__(self, engine: EngineHandle) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def state(self) -> EngineState:
        return replace(self._engine.state(), step_limit_s=0.05)


def test_livez_is_red_while_a_step_does_not_end_and_green_when_it_has_ended(
    running: RunningService, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = running.service.state
    assert state.served is not None
    assert state.passed_limit_s() is None
    with ThreadPoolExecutor() as pool:
        blocked = pool.submit(running.complete, prompt=[BLOCK_TOKEN_ID], max_tokens=1)
        assert gate.reached.wait(60)
        assert running.client.get("/livez").status_code == 200, "it takes longer than a slow model's steps already"
        monkeypatch.setattr(state, "served", replace(state.served, engine=FastEngine(state.served.engine)))
        assert eventually(lambda: running.client.get("/livez").status_code == 503)
        assert_error(
            running.client.get("/livez"),
            503,
            param=None,
            code="stalled",
            message=r"no step was finished for 0\.05 s, longer than this model's steps take; restart",
        )
        gate.opened.set()
        assert blocked.result().status_code == 200
        assert eventually(lambda: running.client.get("/livez").status_code == 200)
    assert state.passed_limit_s() is None, "an idle service is not stuck"


def test_the_gauges_of_the_model_agree_with_the_report(running: RunningService) -> None:
    report = running.client.get("/v1/quantization").json()
    for kind in ("codes", "scales", "unquantized"):
        assert running.metric("weight_bytes", kind=kind) == report["weight_bytes"][kind]
    assert running.metric("weight_original_bytes") == report["original_bytes"]
    assert running.metric("weight_saving_ratio") == report["saving_ratio"]
    assert running.metric("load_peak_bytes", where="host") == report["peak_bytes"]["host"]
    for phase, seconds in report["phase_seconds"].items():
        assert math.isclose(running.metric("load_phase_seconds", phase=phase), seconds)


def test_requests_are_counted_by_route_template_and_status(running: RunningService) -> None:
    before = running.metric("requests_total", route="/v1/models/{model_id:path}", status="404")
    unknown = running.metric("requests_total", route="unknown", status="404")
    for i in range(3):
        running.client.get(f"/v1/models/other-{i}")
        running.client.get(f"/nothing-{i}")
    assert running.metric("requests_total", route="/v1/models/{model_id:path}", status="404") == before + 3
    assert running.metric("requests_total", route="unknown", status="404") == unknown + 3
