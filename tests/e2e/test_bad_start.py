"""Starts that cannot succeed: what the command says, and the code it ends with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.support import ROOT, TIMEOUT_S, clean_environment, ready, started
from tests.hub import TOKEN, Hub, serve_hub

pytestmark = pytest.mark.e2e


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
        (["serve"], {"PENNYWEIGHT_VERIFY": "x"}, "PENNYWEIGHT_VERIFY x: must be 'block' or 'full'"),
        (["serve", "--config", "/nowhere"], {}, "--config /nowhere: cannot be read"),
        (["serve", "--host", "192.0.2.1"], {}, "--host 192.0.2.1 --port 8000: cannot listen there"),
    ],
    ids=["unknown flag", "value", "missing file", "address"],
)
def test_a_wrong_setting_is_2_with_one_line_and_no_traceback(
    arguments: list[str], environment: dict[str, str], message: str
) -> None:
    done = _run(*arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pennyweight: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


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
