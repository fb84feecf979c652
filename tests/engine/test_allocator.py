from __future__ import annotations

import pytest

from service.engine.allocator import BlockAllocator


def make_cached(num_blocks: int, hashes: list[bytes]) -> BlockAllocator:
    """An allocator whose first blocks are cached under `hashes`, the first the least recently used."""
    allocator = BlockAllocator(num_blocks)
    blocks = allocator.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        allocator.publish(block, block_hash)
    allocator.free(blocks)
    return allocator


def test_a_run_is_preferred_to_scattered_blocks() -> None:
    allocator = BlockAllocator(8)
    first, second, third = allocator.allocate(2), allocator.allocate(1), allocator.allocate(5)
    assert (first, second, third) == ([0, 1], [2], [3, 4, 5, 6, 7])
    allocator.free([0])
    allocator.free([3, 4])
    assert allocator.allocate(2) == [3, 4]


def test_the_blocks_behind_the_given_one_are_preferred_if_they_are_free() -> None:
    allocator = BlockAllocator(6)
    allocator.allocate(3)
    allocator.free([0])
    assert allocator.allocate(1, after=2) == [3]
    assert allocator.allocate(1, after=2) == [0]
    assert allocator.allocate(2, after=3) == [4, 5]


def test_scattered_blocks_serve_when_no_run_is_long_enough() -> None:
    allocator = BlockAllocator(5)
    allocator.allocate(5)
    allocator.free([0, 2, 4])
    assert allocator.allocate(3) == [0, 2, 4]
    assert allocator.num_free == 0


def test_cached_blocks_are_found_until_they_are_needed_the_least_recently_used_first() -> None:
    allocator = make_cached(4, [b"a", b"b", b"c"])
    assert (allocator.num_free, allocator.num_cached, allocator.num_available) == (1, 3, 4)
    allocator.share([0])
    allocator.free([0])  # now the most recently used
    assert allocator.allocate(1) == [3], "a free block is preferred"
    assert allocator.allocate(1) == [1]
    assert [allocator.find(block_hash) for block_hash in (b"a", b"b", b"c")] == [0, None, 2]
    assert allocator.allocate(2) == [0, 2]
    assert allocator.num_available == 0
    allocator.check_integrity(range(4))


def test_a_shared_block_is_cached_when_the_last_holder_gives_it_up() -> None:
    allocator = make_cached(1, [b"a"])
    allocator.share([0])
    allocator.share([0])
    allocator.check_integrity([0, 0])
    allocator.free([0])
    assert (allocator.num_holders(0), allocator.num_cached) == (1, 0)
    allocator.free([0])
    assert (allocator.num_holders(0), allocator.num_cached) == (0, 1)


def test_an_unpublished_block_is_found_no_more_and_free_when_nobody_holds_it() -> None:
    allocator = make_cached(2, [b"a", b"b"])
    allocator.share([1])
    for block in (0, 1, 1):
        allocator.unpublish(block)
    assert allocator.find(b"a") is allocator.find(b"b") is None
    assert (allocator.num_free, allocator.num_cached) == (1, 0)
    allocator.free([1])
    assert allocator.num_free == 2
    allocator.check_integrity([])


def test_of_two_blocks_with_one_hash_the_first_is_published() -> None:
    allocator = BlockAllocator(2)
    allocator.allocate(2)
    allocator.publish(0, b"a")
    allocator.publish(1, b"a")
    assert (allocator.find(b"a"), allocator.hash_of(1)) == (0, None)
    allocator.free([0, 1])
    assert (allocator.num_free, allocator.num_cached) == (1, 1)


def test_a_block_cannot_be_freed_twice() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(1)
    allocator.free(blocks)
    with pytest.raises(AssertionError, match="block 0 is freed twice"):
        allocator.free(blocks)


def test_more_blocks_than_are_available_are_not_handed_out() -> None:
    allocator = make_cached(3, [b"a"])
    allocator.share([0])
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 are available"):
        allocator.allocate(3)


def test_integrity_tells_a_lost_block_and_one_held_twice() -> None:
    allocator = BlockAllocator(4)
    held = allocator.allocate(2)
    allocator.check_integrity(held)
    with pytest.raises(AssertionError, match=r"holders, expected: \{1: \(1, 0\)\}"):
        allocator.check_integrity(held[:1])
    with pytest.raises(AssertionError, match=r"holders, expected: \{0: \(1, 2\)\}"):
        allocator.check_integrity([*held, held[0]])
