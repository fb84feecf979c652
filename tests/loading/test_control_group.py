"""Limits of control groups, read from trees of files as version 2 and version 1 of the kernel write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.loading import memory
from service.loading.control_group import ControlGroups, MemoryLimit

NO_LIMIT_V1 = "9223372036854771712"


def groups(folder: Path, membership: str, files: dict[str, str]) -> ControlGroups:
    """Write a tree of control groups."""
    root = folder / "cgroup"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
    (folder / "membership").write_text(membership, encoding="ascii")
    return ControlGroups(root, folder / "membership")


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/a\n", {"b/cpu.max": "50000 100000"}, None),
        ("3:cpu,cpuacct:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpu:/docker/1\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ("1:cpu:/a\n0::/b\n", {"cpu/a/cpu.cfs_quota_us": "7", "cpu/a/cpu.cfs_period_us": "1"}, 7.0),
        ("2:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, None),
        ("", {}, None),
    ],
    ids=[
        *("version 2", "no limit", "that of the outer group", "the least", "another group's", "version 1"),
        *("no limit in version 1", "a path of the host", "both versions", "another controller's", "no groups"),
    ],
)
def test_the_cpu_quota_is_the_least_of_all_groups_around(
    tmp_path: Path, membership: str, files: dict[str, str], quota: float | None
) -> None:
    assert groups(tmp_path, membership, files).cpu_quota() == quota


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "1000", "memory.current": "300"}, (1000, 300)),
        (
            "0::/\n",
            {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 5\ninactive_file 600"},
            (1000, 300),
        ),
        ("0::/\n", {"memory.max": "max", "memory.current": "300"}, None),
        (
            "0::/a\n",
            {"memory.max": "1000", "memory.current": "900", "a/memory.max": "500", "a/memory.current": "100"},
            (1000, 900),
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "8", "memory/memory.usage_in_bytes": "5"}, (8, 5)),
        (
            "4:memory:/\n",
            {"memory/memory.limit_in_bytes": NO_LIMIT_V1, "memory/memory.usage_in_bytes": "5"},
            None,
        ),
    ],
    ids=["version 2", "file pages", "no limit", "least free", "version 1", "no limit in version 1"],
)
def test_the_memory_limit_is_that_of_the_group_with_least_left(
    tmp_path: Path, membership: str, files: dict[str, str], limit: tuple[int, int] | None
) -> None:
    assert groups(tmp_path, membership, files).memory() == limit


def test_more_than_the_limit_leaves_nothing() -> None:
    assert MemoryLimit(100, 130).free_bytes == 0


def test_what_this_process_may_take_is_within_its_groups() -> None:
    limit = ControlGroups().memory()
    assert 0 <= memory.available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert limit is None or memory.available_bytes() <= limit.limit_bytes
