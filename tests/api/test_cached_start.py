"""Starts that leave a quantized model for the next one, and that find it, in this process."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.api.support import eventually, run_service

MEASURED = {"phase_seconds", "total_seconds", "peak_bytes", "resident_before_bytes"}


@pytest.fixture
def settings(checkpoint: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    """Of a tiny Llama with a cache of its own."""
    cached = {"cache_dir": str(tmp_path), "cache_limit": "1GiB"}
    return cached | {"model": str(checkpoint("llama")), "device": "cpu", "dtype": "float32", "threads": 1}


def test_the_second_start_serves_what_the_first_made(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = []
    caplog.set_level(logging.INFO, "service.loading.artifact_cache")
    for start in range(2):
        with run_service(settings) as running:
            if start == 0:
                assert eventually(lambda: running.metric("load_phase_seconds", phase="cache_write") > 0)
            report = running.client.get("/v1/quantization").json()
            lasting = {name: value for name, value in report.items() if name not in MEASURED}
            answers.append((running.canary(), json.dumps(lasting, sort_keys=True)))
            assert running.metric("load_phase_seconds", phase="cache_write") == report["phase_seconds"]["cache_write"]
    assert answers[0] == answers[1]
    assert report["phase_seconds"]["cache_write"] == 0
    messages = [message.partition(" /")[0] for message in caplog.messages]
    assert messages == ["the quantized model is cached in", "taking the quantized model from"]
    assert (tmp_path / "pennyweight").is_dir()


def test_a_service_that_ends_at_once_leaves_a_whole_artifact_or_none(settings: dict[str, Any], tmp_path: Path) -> None:
    with run_service(settings):
        pass
    folders = [path for path in (tmp_path / "pennyweight").glob("*") if path.is_dir()]
    assert all(len(folder.name) == 64 for folder in folders)
    with run_service(settings) as running:
        running.canary()
