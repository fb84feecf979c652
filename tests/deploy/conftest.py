"""What a server exports, for the tests of the files that read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.api.support import run_service


@pytest.fixture(scope="session")
def exposition(checkpoint: Callable[[str], Path]) -> str:
    """The metrics of a server on a CPU that has answered a request on each route for text."""
    settings = {
        "model": str(checkpoint("llama")),
        "quantize": "none",
        "device": "cpu",
        "threads": 1,
        "kv_memory": 2**24,
    }
    with run_service(settings) as running:
        running.canary()
        for route in ("/generate", "/v1/chat/completions"):
            running.client.post(route, json={})
        return running.client.get("/metrics").text


@pytest.fixture(scope="session")
def exported(exposition: str) -> list[Sample]:
    """The samples of it."""
    return [sample for family in text_string_to_metric_families(exposition) for sample in family.samples]
