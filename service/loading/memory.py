"""Resident memory of this process, and the allocator settings that keep it honest.

Peaks come from the kernel's own high-water mark, never from differences of free memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.loading.control_group import ControlGroups

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc malloc.h
_MIB = 1 << 20
_STATUS = Path("/proc/self/status")
_STATUS_BYTES = 1 << 14  # it has some 1,500


def resident_bytes() -> int:
    """Bytes of this process that are in memory now (VmRSS)."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Most bytes of this process that were in memory at once, since it started (VmHWM)."""
    return _status_bytes("VmHWM")


class ProcessMemory:
    """Memory of this process now, from one open file: each call to the system lets another thread have the interpreter.

    Raises:
        OSError: not on Linux.
    """

    def __init__(self) -> None:
        self._file = os.open(_STATUS, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def read(self) -> tuple[int, int]:
        """Bytes in memory (VmRSS), and those of them that no file backs (RssAnon): weights, KV blocks, heap."""
        text = os.pread(self._file, _STATUS_BYTES, 0).decode("ascii")
        return _field_of(text, "VmRSS", _STATUS), _field_of(text, "RssAnon", _STATUS)


def available_bytes() -> int:
    """Bytes that this process can still take without swapping, in its machine and its control group."""
    available = _field_bytes(Path("/proc/meminfo"), "MemAvailable")
    group = ControlGroups().memory()
    return available if group is None else min(available, group.free_bytes)


def _status_bytes(field: str) -> int:
    return _field_bytes(_STATUS, field)


def _field_bytes(path: Path, field: str) -> int:
    return _field_of(path.read_text(encoding="ascii") if path.is_file() else "", field, path)


def _field_of(text: str, field: str, path: Path) -> int:
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {field}; memory can be read on Linux only")


def trim_heap() -> None:
    """Give freed blocks of the C heap back to the machine; on C libraries other than glibc: no effect."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def tight_heap() -> Iterator[None]:
    """Within it, glibc maps every block of 1 MiB or more on its own, so that freeing it gives it back at once.

    By default freed tensors of 20 to 40 MB stay on a fragmented heap: 150 to 200 MB more at the peak of a load.
    After it the heap is trimmed, and blocks up to 32 MiB stay on it, which is what glibc's own adaptation ends
    with: temporaries of a forward would otherwise be mapped, and their pages zeroed, each time.
    On other C libraries: no effect.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 1 * _MIB)
    libc.mallopt(_M_TRIM_THRESHOLD, 16 * _MIB)  # smaller blocks, the temporaries of quantization, are reused
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * _MIB)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None
