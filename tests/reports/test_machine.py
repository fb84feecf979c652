"""Threads: the least of cores, affinity and quota, and which of them it is."""

from __future__ import annotations

import os

import pytest

from service.reports.machine import ThreadLimits, thread_limits


@pytest.mark.parametrize(
    ("affinity", "physical_cores", "quota", "num_threads", "limited_by"),
    [
        (8, 4, None, 4, "physical_cores"),
        (2, 4, None, 2, "affinity"),
        (8, 4, 1.0, 1, "quota"),
        (8, 4, 1.5, 2, "quota"),
        (8, 4, 0.1, 1, "quota"),
        (8, 4, 100.0, 4, "physical_cores"),
        (4, 4, 4.0, 4, "physical_cores"),
    ],
)
def test_the_least_limit_counts(
    affinity: int, physical_cores: int, quota: float | None, num_threads: int, limited_by: str
) -> None:
    limits = ThreadLimits(affinity, physical_cores, quota)
    assert (limits.num_threads, limits.limited_by) == (num_threads, limited_by)


def test_the_affinity_of_this_process_is_seen() -> None:
    cpus = os.sched_getaffinity(0)
    assert 1 <= thread_limits().num_threads <= len(cpus)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        assert thread_limits().affinity == thread_limits().num_threads == 1
    finally:
        os.sched_setaffinity(0, cpus)
