"""Artifacts of models that were loaded before, in a folder that several processes may share.

    <key>/            an artifact; the key is the hash of all that decides about its tensors
    <key>.tmp/        one that is being written, or removed
    identities.json   hashes of checkpoint files, see `identity`
    lock              held by the one process that writes or removes

An artifact is written beside its place and then moved there, so that whatever has its name is whole, unless it was
damaged later, which reading finds. Who holds the lock finds nothing but leftovers under other names.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from filelock import FileLock, Timeout

from service.errors import ArtifactError
from service.loading.artifact import MANIFEST_NAME, artifact_key, stored_bytes
from service.loading.artifact_read import OpenArtifact
from service.loading.artifact_write import ModelContents, sync_folder, write_artifact
from service.loading.background import Stopped
from service.loading.config import ServedModel
from service.loading.identity import IdentityStore, SourceChanged, SourceFile, identified
from service.loading.source import ModelSource
from service.numerics.recipe import Recipe

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{64}")
_LEFTOVER = ".tmp"
_POLL_S: Final = 0.2
_SPARE_BYTES: Final = 64 * 2**20
"""Of the disk, that an artifact leaves free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """Where artifacts are kept, and how.

    Attributes:
        limit_bytes: of all of them together.
    """

    folder: Path
    limit_bytes: int


@dataclass(slots=True, kw_only=True)
class CacheTicket:
    """What a cache has to do with one load: the checkpoint as it was before, and what else decides about the result.

    Attributes:
        facts: without the checkpoint's identity.
        is_damaged: there is an artifact of this load that cannot be used.
    """

    options: CacheOptions
    facts: dict[str, Any]
    files: Sequence[SourceFile]
    is_damaged: bool = False

    def open(self) -> OpenArtifact | None:
        """The artifact of this load, if there is one that looks whole; the caller closes it."""
        if any(file.identity is None for file in self.files):
            return None
        folder = self.options.folder / artifact_key(_with_source(self.facts, self.files))
        if not folder.is_dir():
            return None
        try:
            opened = OpenArtifact(folder)
        except ArtifactError as error:
            self.reject(error)
            return None
        if artifact_key(opened.manifest.facts) != folder.name:
            opened.close()
            self.reject(ArtifactError(f"{folder}: the artifact is of another model or version; quantize it again"))
            return None
        with suppress(OSError):  # a cache that can only be read
            os.utime(folder / MANIFEST_NAME)
        logger.info("taking the quantized model from %s", folder)
        return opened

    def reject(self, error: ArtifactError) -> None:
        """Note that the artifact must be made anew, and why."""
        self.is_damaged = True
        logger.warning("an artifact is not used: %s", str(error).partition(";")[0])

    def save(self, contents: ModelContents, stop: threading.Event | None = None) -> float | None:
        """Write the artifact of this load, if there is none yet.

        Whatever hinders that is logged; nothing half written stays.

        Args:
            stop: ends it when set.

        Returns:
            Seconds; None if none was written.
        """
        began = time.monotonic()
        try:
            files = identified(self.files, stop)
            self.options.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.options.folder, stop):
                _identities(self.options).remember(files)  # without it the artifact would not be found
                is_written = self._save(contents, files, stop)
        except Stopped:
            logger.info("the quantized model was not cached: the service ends")
        except (SourceChanged, ArtifactError) as error:
            logger.info("the quantized model was not cached: %s", error)
        except OSError as error:
            logger.warning("the quantized model was not cached: %s: %s", error.filename or self.options.folder, error)
        else:
            return time.monotonic() - began if is_written else None
        return None

    def _save(self, contents: ModelContents, files: Sequence[SourceFile], stop: threading.Event | None) -> bool:
        """With the lock held."""
        cache = self.options.folder
        for leftover in cache.glob(f"*{_LEFTOVER}"):
            _remove_tree(leftover)
        facts = _with_source(self.facts, files)
        folder = cache / artifact_key(facts)
        if folder.exists() and not (self.is_damaged and _remove(folder)):
            return False
        if not _make_room(cache, contents.num_bytes, self.options.limit_bytes):
            return False
        being_written = folder.with_suffix(_LEFTOVER)
        being_written.mkdir()
        try:
            write_artifact(being_written, contents, facts=facts, stop=stop)
            being_written.rename(folder)
        except BaseException:
            _remove_tree(being_written)
            raise
        sync_folder(cache)
        self.is_damaged = False
        logger.info("the quantized model is cached in %s, %d bytes", folder, stored_bytes(folder))
        return True


def cache_folder(cache_dir: Path | None) -> Path:
    """Where artifacts are kept: in a folder of `--cache-dir`, else of the user's cache.

    Raises:
        RuntimeError: neither is there: the user has no home.
    """
    cache = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return cache.expanduser().absolute() / "pennyweight"


def cached_artifacts(cache: Path) -> dict[Path, int]:
    """The artifacts in a cache, and the bytes of each.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    return {entry: stored_bytes(entry) for entry in cache.iterdir() if _KEY.fullmatch(entry.name) and entry.is_dir()}


def look_up(
    options: CacheOptions,
    source: ModelSource,
    served: ServedModel,
    *,
    recipe: Recipe,
    dtype: torch.dtype,
    paths: Sequence[Path],
) -> CacheTicket:
    """Look at the checkpoint files at `paths`, before they are read."""
    return CacheTicket(
        options=options,
        facts={
            "recipe": recipe.text,
            "dtype": str(dtype).removeprefix("torch."),
            "class": f"{served.model_class.__module__}.{served.model_class.__qualname__}",
            "config": _hash_of(source.folder / "config.json"),
            "code": [_hash_of(path) for path in sorted(source.folder.glob("*.py"))],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        files=_identities(options).look_at(paths),
    )


def _identities(options: CacheOptions) -> IdentityStore:
    return IdentityStore(options.folder / "identities.json")


def _with_source(facts: dict[str, Any], files: Sequence[SourceFile]) -> dict[str, Any]:
    return facts | {"source": [[file.path.name, file.identity] for file in files]}


def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _locked(folder: Path, stop: threading.Event | None) -> Iterator[None]:
    """Within it no other process writes or removes; waits for one that does.

    Raises:
        Stopped: `stop` was set.
        OSError: nothing can be written there.
    """
    lock = FileLock(folder / "lock")
    while True:
        if stop is not None and stop.is_set():
            raise Stopped
        with suppress(Timeout):
            lock.acquire(timeout=_POLL_S)
            break
    try:
        yield
    finally:
        lock.release()


def _make_room(cache: Path, num_bytes: int, limit_bytes: int) -> bool:
    """Remove what was used least recently until so many bytes more are within the limit; whether they are."""
    if num_bytes > limit_bytes:
        logger.info(
            "the quantized model is not cached: it has %d bytes, --cache-limit %d; raise it", num_bytes, limit_bytes
        )
        return False
    entries = cached_artifacts(cache)
    for entry in sorted(entries, key=_last_use):
        if sum(entries.values()) + num_bytes <= limit_bytes:
            break
        if _remove(entry):
            logger.info("%s is removed: --cache-limit %d", entry, limit_bytes)
            del entries[entry]
    free_bytes = shutil.disk_usage(cache).free
    if sum(entries.values()) + num_bytes > limit_bytes or free_bytes < num_bytes + _SPARE_BYTES:
        logger.warning("the quantized model is not cached: no room for %d bytes in %s", num_bytes, cache)
        return False
    return True


def _last_use(entry: Path) -> float:
    try:
        return (entry / MANIFEST_NAME).stat().st_mtime
    except OSError:
        return 0.0


def _remove(entry: Path) -> bool:
    """Remove an artifact that no process reads; whether it is gone."""
    with suppress(FileNotFoundError), (entry / MANIFEST_NAME).open("rb") as manifest:
        try:
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    _remove_tree(entry.rename(entry.with_suffix(_LEFTOVER)))
    return True


def _remove_tree(folder: Path) -> None:
    """Remove a folder with all in it, or a file."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink()
