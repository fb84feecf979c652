"""Memory figures against psutil, and freed blocks that really go back to the system.

Each check runs in a new process: the heap of this one holds what other tests left.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import torch

from service.loading import memory

MIB = 2**20


def anonymous_bytes() -> int:
    return memory.ProcessMemory().read()[1]


def resident_bytes_agree_with_psutil() -> None:
    # Readings a moment apart in a quiet process: pages of the reading itself, well under 16 MiB.
    for found in (memory.resident_bytes(), memory.ProcessMemory().read()[0]):
        assert abs(found - psutil.Process().memory_info().rss) < 16 * MIB


def anonymous_bytes_grow_by_what_is_written_and_shrink_when_it_is_freed() -> None:
    with memory.tight_heap():
        before = anonymous_bytes()
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        written = anonymous_bytes()
        assert written - before >= 64 * MIB
        del block
        assert written - anonymous_bytes() >= 60 * MIB


def freed_blocks_of_20_mib_do_not_stay_on_a_tight_heap() -> None:
    with memory.tight_heap():
        before = anonymous_bytes()
        for _ in range(5):
            blocks = [torch.ones(20 * MIB, dtype=torch.uint8) for _ in range(3)]
            keep = torch.ones(2 * MIB, dtype=torch.uint8)
            del blocks
        assert keep.sum() == 2 * MIB
        assert anonymous_bytes() - before < 20 * MIB


def temporaries_of_a_forward_keep_their_pages_after_the_load() -> None:
    def faults_of_ten_temporaries() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(10 * MIB, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages = 10 * MIB // resource.getpagesize()
    with memory.tight_heap():
        assert faults_of_ten_temporaries() >= 9 * pages
    faults_of_ten_temporaries()
    assert faults_of_ten_temporaries() < pages


def the_peak_is_at_least_what_was_resident_at_once() -> None:
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    resident = memory.resident_bytes()
    del block
    # The kernel folds per-thread counts of up to 64 pages into its high-water mark later than into the size.
    assert memory.peak_resident_bytes() >= resident - MIB


def what_is_available_is_at_most_what_psutil_sees_free() -> None:
    # A control group may allow less; two readings of a shared machine differ by less than a tenth of its memory.
    machine = psutil.virtual_memory()
    assert 0 < memory.available_bytes() <= machine.available + machine.total // 10


CHECKS = [
    resident_bytes_agree_with_psutil,
    anonymous_bytes_grow_by_what_is_written_and_shrink_when_it_is_freed,
    freed_blocks_of_20_mib_do_not_stay_on_a_tight_heap,
    temporaries_of_a_forward_keep_their_pages_after_the_load,
    the_peak_is_at_least_what_was_resident_at_once,
    what_is_available_is_at_most_what_psutil_sees_free,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_a_new_process(check: Callable[[], None]) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(check).result(timeout=120)
