"""A cache that is full, cannot be written, is shared or is left in the middle."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from service.loading.artifact import DATA_NAME, MANIFEST_NAME
from service.loading.artifact_cache import CacheOptions, CacheTicket
from service.loading.artifact_read import OpenArtifact
from service.loading.artifact_write import ModelContents, places_of
from service.loading.identity import IdentityStore
from tests.loading.artifacts import (
    copied,
    entries,
    is_from_cache,
    load_and_save,
    load_through,
    the_entry,
)

LOGGER = "service.loading.artifact_cache"


@pytest.fixture
def tiny(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint that may be changed."""
    return copied(checkpoint("llama"), tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "pennyweight"


@contextmanager
def small_files(max_bytes: int) -> Iterator[None]:
    """Within it no file can grow beyond a size, as on a disk that is full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing_half_written(tiny: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_through(cache, tiny)
    assert loaded.uncached is not None
    with caplog.at_level(logging.WARNING, LOGGER), small_files(20_000):
        assert loaded.uncached.save() is None
    assert "the quantized model was not cached: " in caplog.text
    assert "File too large" in caplog.text
    assert not entries(cache)


def test_a_cache_that_cannot_be_written_keeps_no_model_from_loading(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    loaded = load_through(tmp_path / "file" / "cache", tiny)
    assert loaded.uncached is not None
    with caplog.at_level(logging.WARNING, LOGGER):
        assert loaded.uncached.save() is None
    assert "the quantized model was not cached: " in caplog.text


def test_a_cache_that_can_only_be_read_is_read(
    tiny: Path, cache: Path, as_nobody: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    for path in tiny.iterdir():
        path.chmod(0o644)
    load_and_save(cache, tiny)
    as_nobody(cache)
    assert is_from_cache(load_through(cache, tiny))
    other = load_through(cache, tiny, "w4a16-g64")
    assert other.uncached is not None
    with caplog.at_level(logging.WARNING, LOGGER):
        assert other.uncached.save() is None
    assert "the quantized model was not cached: " in caplog.text


def test_what_was_used_least_recently_goes_first(tiny: Path, cache: Path) -> None:
    recipes = ["w8a16", "w8a16-g64", "w8a16-g32"]
    for recipe in recipes[:2]:
        load_and_save(cache, tiny, recipe)
    for age, path in enumerate(entries(cache), start=10):
        os.utime(path / MANIFEST_NAME, (age, age))
    assert is_from_cache(load_through(cache, tiny, recipes[0]))
    used = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    load_and_save(cache, tiny, recipes[2], limit_bytes=used + 1000)
    assert len(entries(cache)) == 2
    assert [is_from_cache(load_through(cache, tiny, recipe)) for recipe in recipes] == [True, False, True]


def test_what_is_being_read_does_not_go(tiny: Path, cache: Path) -> None:
    load_and_save(cache, tiny, "w8a16")
    entry = the_entry(cache)
    used = sum(file.stat().st_size for file in entry.iterdir())
    other = load_through(cache, tiny, "w8a16-g64", limit_bytes=used + 1000)
    assert other.uncached is not None
    with OpenArtifact(entry) as opened:
        assert other.uncached.save() is None
        opened.read(lambda _: None, verify_full=True)
    assert entries(cache) == [entry]
    assert other.uncached.save() is not None
    assert entry not in entries(cache)


def test_an_artifact_larger_than_the_limit_is_not_written(
    tiny: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_through(cache, tiny, limit_bytes=1000)
    assert loaded.uncached is not None
    with caplog.at_level(logging.INFO, LOGGER):
        assert loaded.uncached.save() is None
    assert "--cache-limit 1000; raise it" in caplog.text
    assert not entries(cache)


def ticket_of(folder: Path, source: Path) -> CacheTicket:
    return CacheTicket(
        options=CacheOptions(folder=folder, limit_bytes=2**40),
        facts={},
        files=IdentityStore(folder / "identities.json").look_at([source]),
    )


def contents_of_size(num_bytes: int) -> ModelContents:
    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(torch.zeros(num_bytes // 4)))
    return ModelContents(places=places_of(module), recipe="w8a16", dtype="float32", is_tied=False, layers={})


SAVE = """
import sys
from pathlib import Path
from tests.loading.test_artifact_limits import contents_of_size, ticket_of

contents = contents_of_size(2**29)
print("begins", flush=True)
ticket_of(Path(sys.argv[1]), Path(sys.argv[2])).save(contents)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tiny: Path, cache: Path) -> None:
    source = tiny / "model.safetensors"
    writer = subprocess.Popen(
        [sys.executable, "-c", SAVE, str(cache), str(source)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"begins\n"
        while not any(path.stat().st_size for path in cache.glob(f"*.tmp/{DATA_NAME}")):
            assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
    assert [path.suffix for path in entries(cache)] == [".tmp"]
    load_and_save(cache, tiny)
    the_entry(cache)
    assert is_from_cache(load_through(cache, tiny))
    shutil.rmtree(cache)
