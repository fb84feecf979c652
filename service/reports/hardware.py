"""What figures of speed depend on: processor, caches, memory, versions. Linux tells; elsewhere much of it is empty."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from service import __version__
from service.loading import memory

CPU_FOLDER = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve"),
)
"""Features that kernels make use of or may come to."""


class Cache(NamedTuple):
    """One cache of one processor; `shared_cpus` is a list of numbers as Linux writes it, such as `0-3`."""

    level: int
    type: str
    size_bytes: int
    shared_cpus: str


def caches(cpu: int, folder: Path = CPU_FOLDER) -> list[Cache]:
    """Caches of a logical CPU, the nearest first; those whose size Linux does not know are left out."""
    found = []
    for path in sorted(folder.glob(f"cpu{cpu}/cache/index[0-9]*")):
        if not (path / "size").is_file():
            continue
        level, kind, size, shared = (
            (path / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size", "shared_cpu_list")
        )
        found.append(Cache(int(level), kind, int(size.removesuffix("K")) * 1024, shared))
    return sorted(found)


def last_level_cache_bytes(folder: Path = CPU_FOLDER) -> int:
    """Sum of the last-level caches behind the CPUs that this process may run on; 0 if that is not known."""
    own = (caches(cpu, folder) for cpu in psutil.Process().cpu_affinity() or [0])
    last = {cache_list[-1] for cache_list in own if cache_list}
    return sum(cache.size_bytes for cache in last)


def cpu_name() -> str:
    """What Linux calls the processor; "" where it has no name for it."""
    return _cpuinfo().get("model name", "")


def describe_machine(num_threads: int) -> dict[str, Any]:
    """All of it as JSON takes it; `num_threads` is what is used of it."""
    cpuinfo = _cpuinfo()
    present = set((cpuinfo.get("flags") or cpuinfo.get("Features", "")).split())
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "family": cpuinfo.get("cpu family"),
        "model": cpuinfo.get("model"),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cpus": psutil.cpu_count(),
        "threads": num_threads,
        "load_average": list(os.getloadavg()),
        "caches": [cache._asdict() for cache in caches(0)],
        "last_level_cache_bytes": last_level_cache_bytes(),
        "flags": [flag for flag in _FLAGS if flag in present],
        "memory_bytes": psutil.virtual_memory().total,
        "available_bytes": memory.available_bytes(),
        "transparent_huge_pages": _HUGE_PAGES.read_text(encoding="ascii").strip() if _HUGE_PAGES.is_file() else None,
        "kernel_release": platform.release(),
        "python": platform.python_version(),
        "pennyweight": __version__,
        "torch": version("torch"),
        "libraries": {name: version(name) for name in ("numpy", "transformers")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor."""
    text = _CPUINFO.read_text(encoding="utf-8") if _CPUINFO.is_file() else ""
    fields = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}
