"""One service for all tests of the API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.support import RunningService, run_service, write_faulty_checkpoint

MAX_BODY_BYTES = 100_000


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
