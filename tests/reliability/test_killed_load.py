"""Starts that are killed in each of their phases, one after another on the same files: the next one starts again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.support import ready, started
from tests.hub import serve_hub
from tests.loading.support import load
from tests.models import write_checkpoint

pytestmark = pytest.mark.reliability

PHASES = ["now download", "now plan", "now load", "now warmup", "ready: "]
"""What the log says when a phase begins; after the last one the quantized model is written into the cache."""


@pytest.mark.nightly
def test_after_a_kill_in_any_phase_the_next_start_serves_the_same_weights(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m", hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    expected = load(folder, "w8a16").report.weight_hash
    with serve_hub("org/name", folder) as hub:
        variables = {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "PENNYWEIGHT_CACHE_DIR": str(tmp_path / "cache"),
            "PENNYWEIGHT_CACHE_LIMIT": str(10**9),
        }
        arguments = ("org/name", "--dtype", "float32", "--device", "cpu", "--kv-memory", "16MiB")
        for phase in PHASES:
            with started(*arguments, environment=variables) as server:
                server.wait_for_log(phase)
                server.process.kill()
                assert server.exit_code() == -signal.SIGKILL
        for _ in range(2):  # the second one may take it from the cache
            with ready(*arguments, environment=variables) as (server, client):
                assert client.get("/v1/quantization").json()["weight_hash"] == expected
                server.wait_for_log("the quantized model ")
                server.process.send_signal(signal.SIGTERM)
                assert server.exit_code() == 0
