from __future__ import annotations

import pytest

from service.engine.allocator import BlockAllocator


def test_a_run_is_preferred_to_scattered_blocks() -> None:
    allocator = BlockAllocator(8)
    first, second, third = allocator.allocate(2), allocator.allocate(1), allocator.allocate(5)
    assert (first, second, third) == ([0, 1], [2], [3, 4, 5, 6, 7])
    allocator.free([0])
    allocator.free([3, 4])
    assert allocator.allocate(2) == [3, 4]


def test_scattered_blocks_serve_when_no_run_is_long_enough() -> None:
    allocator = BlockAllocator(5)
    allocator.allocate(5)
    allocator.free([0, 2, 4])
    assert allocator.allocate(3) == [0, 2, 4]
    assert allocator.num_free == 0


def test_a_block_cannot_be_freed_twice() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(1)
    allocator.free(blocks)
    with pytest.raises(AssertionError, match="block 0 is freed twice"):
        allocator.free(blocks)


def test_integrity_tells_a_lost_block_and_one_held_twice() -> None:
    allocator = BlockAllocator(4)
    held = allocator.allocate(2)
    allocator.check_integrity(held)
    with pytest.raises(AssertionError, match="blocks in use"):
        allocator.check_integrity(held[:1])
    with pytest.raises(AssertionError, match="blocks in use"):
        allocator.check_integrity([*held, held[0]])
