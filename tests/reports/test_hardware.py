"""What is told of a machine: caches as Linux lists them, and nothing that JSON cannot hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from service.reports.hardware import Cache, caches, describe_machine, last_level_cache_bytes


def _write_cache(folder: Path, cpu: int, cache: Cache) -> None:
    path = folder / f"cpu{cpu}" / "cache" / f"index{cache.level}"
    path.mkdir(parents=True)
    for name, text in {"level": cache.level, "type": cache.type, "shared_cpu_list": cache.shared_cpus}.items():
        (path / name).write_text(f"{text}\n", encoding="ascii")
    (path / "size").write_text(f"{cache.size_bytes // 1024}K\n", encoding="ascii")


@pytest.mark.parametrize(("shared", "num_caches"), [("0-1023", 1), (None, len(os.sched_getaffinity(0)))])
def test_a_last_cache_that_cpus_share_counts_once(tmp_path: Path, shared: str | None, num_caches: int) -> None:
    last = Cache(3, "Unified", 32 << 20, shared or "")
    for cpu in os.sched_getaffinity(0):
        _write_cache(tmp_path, cpu, Cache(1, "Data", 32 << 10, str(cpu)))
        _write_cache(tmp_path, cpu, last._replace(shared_cpus=shared or str(cpu)))
    assert caches(min(os.sched_getaffinity(0)), tmp_path)[-1].size_bytes == 32 << 20
    assert last_level_cache_bytes(tmp_path) == num_caches * (32 << 20)


def test_without_a_list_of_caches_none_is_known(tmp_path: Path) -> None:
    assert caches(0, tmp_path) == []
    assert last_level_cache_bytes(tmp_path) == 0


def test_a_cache_of_unknown_size_is_left_out(tmp_path: Path) -> None:
    for cache in (Cache(1, "Data", 32 << 10, "0"), Cache(2, "Unified", 1 << 20, "0")):
        _write_cache(tmp_path, 0, cache)
    (tmp_path / "cpu0" / "cache" / "index2" / "size").unlink()
    assert caches(0, tmp_path) == [Cache(1, "Data", 32 << 10, "0")]


def test_a_machine_is_described_in_json() -> None:
    machine = json.loads(json.dumps(describe_machine(3)))
    assert machine["threads"] == 3
    assert machine["memory_bytes"] == psutil.virtual_memory().total
    assert machine["logical_cpus"] == os.cpu_count()
    assert {"cpu", "physical_cores", "caches", "flags", "torch", "libraries", "date"} <= machine.keys()
