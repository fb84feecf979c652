"""One service for all tests of the API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.support import RunningService, run_service, write_chat_checkpoint, write_faulty_checkpoint
from tests.models import VOCAB_SIZE

MAX_BODY_BYTES = 100_000
SETTINGS = {"quantize": "none", "device": "cpu", "dtype": "float32", "threads": 1, "kv_memory": 2**24}


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A tiny Llama without quantization, context 256, 300 tokens of vocabulary, room for 4 sequences and 4 more."""
    folder = write_faulty_checkpoint(tmp_path_factory.mktemp("faulty") / "tiny")
    settings = {
        "model": str(folder),
        "quantize": "none",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "max_num_seqs": 4,
        "max_queue": 4,
        "kv_memory": 2**24,
        "max_body_bytes": MAX_BODY_BYTES,
        "drain_timeout": 5,
    }
    with run_service(settings) as service:
        yield service


@pytest.fixture(scope="session")
def canary_text(running: RunningService) -> str:
    """What the canary said before anything bad was tried."""
    return running.canary()


@pytest.fixture
def still_good(running: RunningService, canary_text: str) -> Iterator[None]:
    """After the test a good request gives what it gave before."""
    yield
    assert running.canary() == canary_text


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A tiny Llama with a chat template, two tokens that end a text, and defaults that make it greedy."""
    folder = tmp_path_factory.mktemp("chat") / "talker"
    write_chat_checkpoint(folder, eos_token_id=[0, VOCAB_SIZE + 1], do_sample=True, temperature=0.7, top_k=1)
    with run_service(SETTINGS | {"model": str(folder), "max_body_bytes": MAX_BODY_BYTES}) as service:
        yield service
