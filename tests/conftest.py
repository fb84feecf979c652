"""Fixtures that several test folders share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.models import FaultyLlama, write_checkpoint


class Gate(NamedTuple):
    """Where `FaultyLlama` waits when it meets `BLOCK_TOKEN_ID`: `reached` is set on arrival, `opened` lets it pass."""

    reached: threading.Event
    opened: threading.Event


@pytest.fixture
def gate() -> Iterator[Gate]:
    """The gate, closed; it opens when the test ends, so that no thread stays behind it."""
    gate = Gate(FaultyLlama.reached, FaultyLlama.opened)
    for event in gate:
        event.clear()
    yield gate
    gate.opened.set()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The float32 checkpoint of a family in one shard, written once for all tests; not to be changed by any."""
    folders: dict[str, Path] = {}

    def written(family: str) -> Path:
        if family not in folders:
            folders[family] = write_checkpoint(family, tmp_path_factory.mktemp(family) / family)
        return folders[family]

    return written
