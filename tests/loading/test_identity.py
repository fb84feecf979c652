from __future__ import annotations

import hashlib
import logging
import os
import threading
from pathlib import Path

import pytest

from service.loading.background import Stopped
from service.loading.identity import IdentityStore, SourceChanged, blob_identity, identified

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def store(tmp_path: Path) -> IdentityStore:
    return IdentityStore(tmp_path / "identities.json")


def identity(store: IdentityStore, path: Path) -> str | None:
    (file,) = store.look_at([path])
    return file.identity


def remember(store: IdentityStore, path: Path) -> None:
    store.remember(identified(store.look_at([path])))


def test_a_file_is_known_once_it_was_hashed(store: IdentityStore, shard: Path) -> None:
    assert identity(store, shard) is None
    remember(store, shard)
    assert identity(store, shard) == SHA256


def test_a_file_that_was_changed_and_given_its_old_time_is_not_known(store: IdentityStore, shard: Path) -> None:
    before = shard.stat()
    remember(store, shard)
    shard.write_bytes(CONTENT[::-1])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = shard.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
    assert identity(store, shard) is None


def test_another_file_in_its_place_is_not_known(store: IdentityStore, shard: Path, tmp_path: Path) -> None:
    remember(store, shard)
    other = tmp_path / "other"
    other.write_bytes(CONTENT)
    os.utime(other, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns))
    other.replace(shard)
    assert identity(store, shard) is None


def test_a_link_is_known_as_what_it_leads_to(store: IdentityStore, shard: Path, tmp_path: Path) -> None:
    remember(store, shard)
    link = tmp_path / "link"
    link.symlink_to(shard)
    assert identity(store, link) == SHA256


def test_files_that_are_gone_are_forgotten(store: IdentityStore, shard: Path, tmp_path: Path) -> None:
    remember(store, shard)
    shard.rename(tmp_path / "moved")
    remember(store, tmp_path / "moved")
    assert str(shard) not in (tmp_path / "identities.json").read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', "\0"], ids=repr)
def test_a_damaged_store_knows_nothing_and_is_written_anew(
    store: IdentityStore, shard: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "identities.json").write_text(text)
    assert identity(store, shard) is None
    remember(store, shard)
    assert identity(store, shard) == SHA256


def test_a_file_that_changes_while_it_is_hashed_has_no_identity(store: IdentityStore, shard: Path) -> None:
    files = store.look_at([shard])
    shard.write_bytes(CONTENT + b"!")
    with pytest.raises(SourceChanged, match=r"model.safetensors was changed while the model was loaded"):
        identified(files)


def test_hashing_ends_when_asked_to(store: IdentityStore, shard: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        identified(store.look_at([shard]), stop)


def test_a_blob_of_the_hub_is_its_name(store: IdentityStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / SHA256).write_bytes(CONTENT)
    link = snapshot / "model.safetensors"
    link.symlink_to(Path("..", "..", "blobs", SHA256))
    with caplog.at_level(logging.DEBUG):
        assert identity(store, link) == SHA256
    store.remember(identified(store.look_at([link])))
    assert not (tmp_path / "identities.json").exists()


@pytest.mark.parametrize("name", ["blobs/name", f"blobs/{SHA256}"])
def test_other_links_are_no_blobs(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    link = tmp_path / "link"
    link.symlink_to(target)
    assert blob_identity(link) is None
