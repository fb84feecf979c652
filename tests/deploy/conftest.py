"""What a server exports, for the tests of the files that read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.api.support import run_service


@pytest.fixture(scope="session")
def exported(checkpoint: Callable[[str], Path]) -> list[Sample]:
    """All samples of a server on a CPU that has answered a request."""
    settings = {
        "model": str(checkpoint("llama")),
        "quantize": "none",
        "device": "cpu",
        "threads": 1,
        "kv_memory": 2**24,
    }
    with run_service(settings) as running:
        running.canary()
        text = running.client.get("/metrics").text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]
