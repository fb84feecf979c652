"""One service with keys for all tests of what it survives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.support import RunningService, run_service, write_chat_checkpoint
from tests.models import VOCAB_SIZE

KEY = "tide-and-lantern-0123456789"
CONTEXT = 32
"""Small, so that no text takes long."""
MAX_BODY_BYTES = 2**20


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A tiny Llama with a chat template, behind a key that `client` sends."""
    folder = tmp_path_factory.mktemp("keyed")
    write_chat_checkpoint(folder / "talker", eos_token_id=[0, VOCAB_SIZE + 1])
    (folder / "keys").write_text(f"tester:{KEY}", encoding="utf-8")
    settings = {
        "model": str(folder / "talker"),
        "quantize": "none",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "kv_memory": 2**24,
        "max_model_len": CONTEXT,
        "max_body_bytes": MAX_BODY_BYTES,
        "receive_timeout": 2,
        "api_keys_file": str(folder / "keys"),
    }
    with run_service(settings) as service:
        service.client.headers["Authorization"] = f"Bearer {KEY}"
        yield service
