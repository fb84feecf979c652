"""A scrape answers whatever the service does, and what clients send is in none of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.engine.sequence import FinishReason
from service.loading.progress import Phase
from service.metrics import REJECT_REASONS
from tests.api.support import RunningService, eventually, run_service, write_faulty_checkpoint
from tests.conftest import Gate
from tests.models import BLOCK_TOKEN_ID
from tests.web.support import serve_phases

BLOCK: dict[str, Any] = {"prompt": [BLOCK_TOKEN_ID], "max_tokens": 1}
LABELS = {"model", "scheme", "device", "route", "status", "reason", "kind", "state", "where", "phase", "stat", "le"}
INFO_LABELS = {"revision", "dtype", "kernel", "recipe", "version"}
NUM_VALUES = 20
KINDS: dict[str, tuple[str, dict[str, set[str]]]] = {
    "model_info": ("gauge", {}),
    "weight_bytes": ("gauge", {"kind": {"codes", "scales", "unquantized"}}),
    "weight_original_bytes": ("gauge", {}),
    "weight_saving_ratio": ("gauge", {}),
    "weight_bits_per_parameter": ("gauge", {}),
    "load_peak_bytes": ("gauge", {"where": {"host"}}),
    "load_phase_seconds": ("gauge", {"phase": {"read", "quantize", "pack", "install", "cache_write", "probe"}}),
    "memory_bytes": ("gauge", {"kind": {"rss", "anon", "kv_cache"}}),
    "quantization_error_ratio": ("gauge", {"stat": {"max", "mean"}}),
    "fidelity_kl_nats": ("gauge", {}),
    "fidelity_top1_ratio": ("gauge", {}),
    "requests": ("counter", {"status": {"200", "400"}}),
    "requests_running": ("gauge", {}),
    "requests_waiting": ("gauge", {}),
    "requests_rejected": ("counter", {"reason": set(REJECT_REASONS)}),
    "requests_finished": ("counter", {"reason": set(FinishReason)}),
    "request_queue_seconds": ("histogram", {}),
    "time_to_first_token_seconds": ("histogram", {}),
    "inter_token_seconds": ("histogram", {}),
    "request_seconds": ("histogram", {}),
    "step_seconds": ("histogram", {"kind": {"prefill", "decode"}}),
    "prompt_tokens": ("counter", {}),
    "generated_tokens": ("counter", {}),
    "engine_tokens": ("counter", {}),
    "prefix_cache_hit_tokens": ("counter", {}),
    "preemptions": ("counter", {}),
    "batch_sequences": ("histogram", {}),
    "batch_tokens": ("histogram", {}),
    "kv_blocks": ("gauge", {"state": {"used", "cached", "free"}}),
    "kv_utilization_ratio": ("gauge", {}),
    "step_errors": ("counter", {}),
    "nonfinite_logits": ("counter", {}),
    "last_step_timestamp_seconds": ("gauge", {}),
    "ready": ("gauge", {}),
}
"""Type of each metric, and all values of a label, of a server on a CPU that runs one request at a time."""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that waits at the gate when it meets a token."""
    return write_faulty_checkpoint(tmp_path_factory.mktemp("scraped") / "tiny")


@pytest.fixture
def running(faulty: Path) -> Iterator[RunningService]:
    """A service of that model."""
    settings = {
        "model": str(faulty),
        "quantize": "none",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "kv_memory": 2**22,
        "cors_origin": "http://localhost:3000",
    }
    with run_service(settings) as service:
        yield service


def scrape(url: str) -> dict[str, list[dict[str, str]]]:
    """Labels of the samples by their name; on a connection of its own, as it is there also during a drain."""
    response = httpx.get(f"{url}/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found.setdefault(sample.name.removeprefix("pennyweight_"), []).append(sample.labels)
    return found


def value(url: str, name: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    (found,) = [s.value for family in families for s in family.samples if s.name == f"pennyweight_{name}"]
    return found


def test_every_metric_has_its_type_and_the_values_of_its_labels(exposition: str) -> None:
    families = {family.name: family for family in text_string_to_metric_families(exposition)}
    assert families.keys() == {f"pennyweight_{name}" for name in KINDS}
    for name, (kind, labels) in KINDS.items():
        family = families[f"pennyweight_{name}"]
        assert family.type == kind, name
        for label, values in labels.items():
            assert {sample.labels[label] for sample in family.samples} == values, (name, label)


def test_a_scrape_answers_in_each_phase_of_a_load_without_figures_of_the_model() -> None:
    phases = [Phase.RESOLVE, Phase.DOWNLOAD, Phase.PLAN, Phase.LOAD, Phase.WARMUP, Phase.FAILED]
    with serve_phases() as (url, progress):
        for phase in phases:
            progress.enter(phase)
            assert value(url, "ready") == 0
            found = scrape(url)
            assert {"memory_bytes", "requests_total"} <= found.keys()
            assert not {"weight_bytes", "model_info", "kv_blocks", "requests_running"} & found.keys()


def test_a_scrape_does_not_wait_for_a_step(running: RunningService, gate: Gate) -> None:
    with ThreadPoolExecutor() as pool:
        blocked = pool.submit(running.complete, **BLOCK)
        assert gate.reached.wait(60)
        assert value(running.url, "requests_running") == 1
        assert value(running.url, "ready") == 1
        assert not blocked.done()
        gate.opened.set()
        assert blocked.result().status_code == 200
    assert eventually(lambda: value(running.url, "requests_running") == 0)


def test_a_scrape_answers_while_the_service_drains(running: RunningService, gate: Gate) -> None:
    before = scrape(running.url)
    with ThreadPoolExecutor() as pool:
        blocked = pool.submit(running.complete, **BLOCK)
        assert gate.reached.wait(60)
        running.service.on_signal()
        assert eventually(lambda: value(running.url, "ready") == 0)
        assert value(running.url, "requests_running") == 1
        assert running.client.post("/generate", json={"prompt": "a"}).status_code == 503
        assert before.keys() <= scrape(running.url).keys()
        gate.opened.set()
        assert blocked.result().status_code == 200
    assert running.wait_for_end() == 0


def send_everything(running: RunningService, word: str) -> None:
    """Put a word wherever a client can put one."""
    client = running.client
    headers = {"X-Request-ID": word, "User-Agent": word, "Authorization": f"Bearer {word}", "X-API-Key": word}
    headers |= {"Origin": f"http://{word}", "X-Forwarded-For": word, "Traceparent": word}
    fields: dict[str, Any] = {"prompt": "The sea", "max_tokens": 1, "user": word, "metadata": {word: word}}
    fields |= {"safety_identifier": word, "prompt_cache_key": word, "service_tier": word, "stop": [word]}
    chat = {"messages": [{"role": "user", "content": word, "name": word}], "max_tokens": 1}
    for body in (fields, fields | {"model": word}, fields | {word: word}, fields | {"prompt": word, "stream": True}):
        client.post("/v1/completions", json=body, headers=headers)
    client.post("/v1/chat/completions", json=chat | {"model": word}, headers=headers)
    client.post("/v1/chat/completions", json=chat, headers=headers)
    client.post("/generate", json={"prompt": word, "max_tokens": 1, word: 1}, headers=headers)
    client.post("/tokenize", json={"prompt": word}, headers=headers)
    client.post("/generate", content=word.encode(), headers=headers | {"Content-Type": word})
    for path in (f"/{word}", f"/v1/models/{word}", f"/v1/models/{word}/{word}", f"/metrics?{word}={word}"):
        client.get(path, headers=headers)
    client.request(word.upper(), "/generate", headers=headers)
    client.options("/generate", headers=headers | {"Access-Control-Request-Method": word.upper()})
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(f"{word.upper()} {word} {word}\r\n\r\n".encode())
        while raw.recv(4096):
            pass


def test_nothing_that_a_client_sends_is_in_a_label_or_makes_a_series(running: RunningService) -> None:
    send_everything(running, "strangeword")
    names = scrape(running.url)
    text = running.client.get("/metrics").text
    assert "strangeword" not in text.lower()
    for number in range(NUM_VALUES):
        send_everything(running, f"strangeword{number}x")
    again = scrape(running.url)
    assert "strangeword" not in running.client.get("/metrics").text.lower()
    assert {name: len(samples) for name, samples in again.items()} == {
        name: len(samples) for name, samples in names.items()
    }


def test_labels_have_values_of_closed_sets(running: RunningService) -> None:
    send_everything(running, "strangeword")
    found = scrape(running.url)
    templates = {
        path.replace("{model_id}", "{model_id:path}") for path in running.client.get("/openapi.json").json()["paths"]
    }
    for name, samples in found.items():
        for labels in samples:
            assert labels.keys() <= LABELS | (INFO_LABELS if name == "model_info" else set())
    assert {labels["route"] for labels in found["requests_total"]} <= templates | {"unknown"}
    assert all(len(labels["status"]) == 3 and labels["status"].isdigit() for labels in found["requests_total"])
    assert {labels["reason"] for labels in found["requests_rejected_total"]} == set(REJECT_REASONS)
    assert {labels["reason"] for labels in found["requests_finished_total"]} == set(FinishReason)
    assert {labels["kind"] for labels in found["step_seconds_count"]} <= {"prefill", "decode", "mixed"}
