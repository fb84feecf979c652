"""One service for all clients: a model that misbehaves on request, behind a key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.support import RunningService, run_service, write_faulty_checkpoint

KEY = "harbour-and-heather-0123456789"
MODEL = "tiny"
REQUEST_TIMEOUT_S = 3


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A tiny Llama with a chat template."""
    folder = tmp_path_factory.mktemp("clients")
    (folder / "keys").write_text(f"client:{KEY}", encoding="utf-8")
    settings = {
        "model": str(write_faulty_checkpoint(folder / MODEL)),
        "quantize": "none",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "kv_memory": 2**24,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_queue": 4,
        "request_timeout": REQUEST_TIMEOUT_S,
        "api_keys_file": str(folder / "keys"),
    }
    with run_service(settings) as service:
        service.client.headers["Authorization"] = f"Bearer {KEY}"
        yield service
