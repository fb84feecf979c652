"""Starts that cannot succeed: what the command says, and the code it ends with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.kernels import dispatch
from tests.e2e.support import ROOT, TIMEOUT_S, clean_environment, ready, started
from tests.hub import TOKEN, Hub, serve_hub


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *arguments]
    variables = clean_environment() | environment
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["serve", "--prot", "1"], {}, "--prot: no setting of version"),
        (["serve"], {"PENNYWEIGHT_TWIN": "x"}, "PENNYWEIGHT_TWIN=x: not part of version"),
        (["serve", "--config", "/nowhere"], {}, "--config /nowhere: cannot be read"),
        (["serve", "--host", "192.0.2.1"], {}, "--host 192.0.2.1 --port 8000: cannot listen there"),
    ],
    ids=["unknown flag", "later variable", "missing file", "address"],
)
def test_a_wrong_setting_is_2_with_one_line_and_no_traceback(
    arguments: list[str], environment: dict[str, str], message: str
) -> None:
    done = _run(*arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pennyweight: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-memory", "900TiB"], "--kv-memory 989560464998400: only"),
        (["--max-model-len", "1024", "--kv-memory", "1MiB"], "--max-model-len 1024: the KV memory holds"),
        (["--max-model-len", "2048"], "--max-model-len 2048: model was made for 1024 tokens"),
    ],
    ids=["more than is free", "too little for the context", "more than the context"],
)
def test_limits_that_do_not_fit_end_the_start_with_2(arguments: list[str], message: str) -> None:
    with started(*arguments) as server:
        assert server.exit_code() == 2
    assert any(message in line for line in server.log), server.log


@pytest.mark.skipif(not dispatch.obstacle("amx"), reason="this machine runs every kind of kernels")
def test_kernels_that_the_machine_lacks_end_the_start_with_2() -> None:
    with started(environment={"PENNYWEIGHT_KERNEL_ISA": "amx"}) as server:
        assert server.exit_code() == 2
    assert any("--kernel-isa amx: " in line and "; use auto" in line for line in server.log), server.log


@pytest.fixture
def gated_hub(checkpoint: Callable[[str], Path]) -> Iterator[Hub]:
    """A hub with a tiny Llama for those who have the token."""
    with serve_hub("org/gated", checkpoint("llama"), gated=True) as hub:
        yield hub


def _hub_variables(hub: Hub, home: Path) -> dict[str, str]:
    """Variables that let a process see this hub and nothing of the user's."""
    return {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": ""}


def test_a_gated_model_is_1_without_its_token_and_served_with_it(gated_hub: Hub, tmp_path: Path) -> None:
    variables = _hub_variables(gated_hub, tmp_path / "home")
    with started("org/gated", "--log-format", "json", environment=variables) as server:
        assert server.exit_code() == 1
    entries = [json.loads(line) for line in server.log]
    assert entries[-1]["level"] == "ERROR"
    assert "org/gated is gated: ask for access" in entries[-1]["message"]
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n", encoding="utf-8")
    with ready("org/gated", "--hf-token-file", str(token), environment=variables) as (server, client):
        assert client.get("/v1/models").json()["data"][0]["id"] == "org/gated"
    assert any("download took" in line and "bytes; now plan" in line for line in server.log)
    assert not any(TOKEN in line for line in server.log)
