"""Quantized models that several processes share: the cache, and what `pennyweight quantize` writes."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.api.support import CANARY, eventually
from tests.e2e.support import ROOT, clean_environment, ready, started

pytestmark = pytest.mark.e2e


def artifacts(cache: Path) -> list[Path]:
    """Those that are whole."""
    return [path for path in (cache / "pennyweight").glob("*") if len(path.name) == 64]


def test_two_services_that_start_at_once_both_serve_and_leave_one_artifact(tmp_path: Path) -> None:
    cache = ("--cache-dir", str(tmp_path), "--cache-limit", "1GiB")
    with ExitStack() as stack:
        servers = [stack.enter_context(started(*cache)) for _ in range(2)]
        clients = [stack.enter_context(server.client()) for server in servers]
        for server in servers:
            server.wait_for_log("ready: ")
        texts = [client.post("/v1/completions", json=CANARY).json()["choices"][0]["text"] for client in clients]
        assert eventually(lambda: len(artifacts(tmp_path)) == 1)
        assert texts[0] == texts[1]
    with ready(*cache) as (server, client):
        assert any("taking the quantized model from" in line for line in server.log)
        assert client.post("/v1/completions", json=CANARY).json()["choices"][0]["text"] == texts[0]
    assert len(artifacts(tmp_path)) == 1


def test_a_quantized_folder_serves_what_the_model_serves(tmp_path: Path) -> None:
    output = tmp_path / "quantized"
    words = ["quantize", "--quantize", "w4a16-g64", "--threads", "1", "--output", str(output)]
    subprocess.run([sys.executable, "-m", "service", *words], cwd=ROOT, env=clean_environment(), check=True)
    answers = []
    for arguments in ((str(output),), ("--quantize", "w4a16-g64")):
        with ready(*arguments) as (_, client):
            report = client.get("/v1/quantization").json()
            text = client.post("/v1/completions", json=CANARY).json()["choices"][0]["text"]
            answers.append((text, report["system_fingerprint"], report["recipe"], report["layers"]))
    assert answers[0] == answers[1]


def test_a_quantized_folder_refuses_another_recipe(tmp_path: Path) -> None:
    output = tmp_path / "quantized"
    words = ["quantize", "--threads", "1", "--output", str(output)]
    subprocess.run([sys.executable, "-m", "service", *words], cwd=ROOT, env=clean_environment(), check=True)
    with started(str(output), "--quantize", "nf4") as server:
        assert server.exit_code() == 2
        assert f"--quantize nf4: {output} was quantized with w8a16; leave --quantize out" in server.log[-1]
