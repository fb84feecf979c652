"""Limits of this process's control groups, version 2 or 1, as kernel.org/doc describes their files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class MemoryLimit(NamedTuple):
    """Memory of one group, in bytes; `used_bytes` leaves out file pages that the kernel gives up first."""

    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What can still be taken."""
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class ControlGroups:
    """The groups that hold a process, from its own to the outermost that can be seen.

    Attributes:
        root: where the hierarchies are mounted.
        membership: lists a path in each hierarchy; in a container it may be the host's and not exist here.
    """

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def cpu_quota(self) -> float | None:
        """CPU seconds that may be used in a second, the least of all groups; None without a limit."""
        quotas = []
        for folder in self._folders("cpu"):
            words = _text(folder / "cpu.max").split()
            words = words or [_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")]
            if all(word.isdigit() for word in words):  # without a limit: "max", or -1
                quotas.append(int(words[0]) / int(words[1]))
        return min(quotas, default=None)

    def memory(self) -> MemoryLimit | None:
        """The group that has the least memory left; None without a limit."""
        limits = []
        for folder in self._folders("memory"):
            limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
            used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
            if limit.isdigit() and used.isdigit() and int(limit) < _NO_LIMIT:
                limits.append(MemoryLimit(int(limit), int(used) - _reclaimable_bytes(folder)))
        return min(limits, key=lambda limit: limit.free_bytes, default=None)

    def _folders(self, controller: str) -> Iterator[Path]:
        for line in _text(self.membership).splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                bases = [self.root, self.root / "unified"]
            elif controller in controllers.split(","):
                bases = [self.root / controller]
            else:
                continue
            for base in bases:
                own = base / path.lstrip("/")
                yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(base))


_NO_LIMIT = 2**60
"""Version 1 states the largest multiple of a page for no limit."""


def _reclaimable_bytes(folder: Path) -> int:
    fields = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _text(path: Path) -> str:
    """What a file holds; "" if it is not there or not for us."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
