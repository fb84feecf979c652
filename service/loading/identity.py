"""Which weights lie in a checkpoint file, as a word that stands for its contents.

A file of the hub's cache is a link to a blob whose name is the hash of what it holds. Any other file is hashed once,
after its first load, and the hash is remembered with size, inode and both times of the file. The time of the last
change of the inode (ctime) cannot be set by programs, so that a file that was written to is noticed even where its
own time (mtime) was set back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from service.errors import CheckpointError
from service.loading.background import Stopped

logger = logging.getLogger(__name__)

_BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_READ_BYTES = 4 * 2**20
_CLOCK_TICK_NS = 20_000_000
"""Longer than the grain of file times: the tick of the kernel's clock, at most 10 ms."""


class SourceChanged(CheckpointError):
    """A checkpoint file changed after it had been looked at."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What changes when a file does."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """The stamp of a file as it is now."""
        status = path.stat()
        return cls(status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A checkpoint file before it is read.

    Attributes:
        identity: of what it holds, if that is known.
    """

    path: Path
    stamp: FileStamp
    identity: str | None

    def require_unchanged(self) -> None:
        """Raise SourceChanged if it is not the file that it was."""
        if FileStamp.of(self.path) != self.stamp:
            raise SourceChanged(f"{self.path.name} was changed while the model was loaded; start again")


class IdentityStore:
    """The hashes of files that were seen before, in a file of a cache."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def look_at(self, paths: Sequence[Path]) -> list[SourceFile]:
        """The files as they are now, before one of them is read.

        A file that was changed within the last tick of the clock could be changed again with the same times; it waits
        for the tick to end.
        """
        known = self._read()
        stamps = {path: FileStamp.of(path) for path in paths}
        if time.time_ns() - max(stamp.ctime_ns for stamp in stamps.values()) < _CLOCK_TICK_NS:
            time.sleep(_CLOCK_TICK_NS / 1e9)
        files = []
        for path, stamp in stamps.items():
            row = known.get(str(path.resolve()), {})
            identity = blob_identity(path)
            if identity is None and row.get("stamp") == asdict(stamp):
                identity = str(row["sha256"])
            files.append(SourceFile(path, stamp, identity))
        return files

    def remember(self, files: Sequence[SourceFile]) -> None:
        """Store what is known of files that are not the hub's; files that no longer exist are forgotten.

        Raises:
            OSError: the store cannot be written.
        """
        before = self._read()
        rows = {path: row for path, row in before.items() if os.path.exists(path)}
        for file in files:
            if file.identity is not None and blob_identity(file.path) is None:
                rows[str(file.path.resolve())] = {"stamp": asdict(file.stamp), "sha256": file.identity}
        if rows == before:
            return
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self) -> dict[str, Mapping[str, object]]:
        """What is stored; nothing if that cannot be read."""
        try:
            rows = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s cannot be read (%s): checkpoint files are hashed again", self._path, error)
            return {}
        if not isinstance(rows, dict):
            return {}
        return {path: row for path, row in rows.items() if isinstance(row, dict) and "sha256" in row}


def blob_identity(path: Path) -> str | None:
    """The hash in the name of the hub's blob that a file links to; None for other files."""
    if not path.is_symlink():
        return None
    blob = path.resolve()
    is_blob = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    return blob.name if is_blob and _BLOB_NAME.fullmatch(blob.name) else None


def identified(files: Sequence[SourceFile], stop: threading.Event | None = None) -> list[SourceFile]:
    """The files with their identities; those that are not known are read and hashed.

    Raises:
        SourceChanged: one is no longer the file that it was.
        Stopped: `stop` was set.
        OSError: one cannot be read.
    """
    done = []
    for file in files:
        identity = _sha256(file.path, stop) if file.identity is None else file.identity
        file.require_unchanged()
        done.append(SourceFile(file.path, file.stamp, identity))
    return done


def _sha256(path: Path, stop: threading.Event | None) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop is not None and stop.is_set():
                raise Stopped
            digest.update(buffer[:count])
    return digest.hexdigest()
