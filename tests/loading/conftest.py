"""What tests of loading share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def as_nobody() -> Iterator[Callable[[Path], None]]:
    """Make a folder readable only, also for root, who becomes another user for the rest of the test."""
    uid = os.geteuid()

    def protect(folder: Path) -> None:
        for path in (folder, *folder.rglob("*"), *list(folder.parents)[:-2]):
            path.chmod(path.stat().st_mode | 0o555)
        folder.chmod(0o555)
        if uid == 0:
            os.seteuid(65534)

    yield protect
    os.seteuid(uid)
