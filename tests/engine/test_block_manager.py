from __future__ import annotations

import pytest

from service.engine.allocator import BlockAllocator
from service.engine.block_manager import BlockManager
from service.engine.sequence import SamplingParams, Sequence

BLOCK_SIZE = 4


def make_manager(num_blocks: int = 16, *, prefix_cache: bool = True) -> tuple[BlockManager, BlockAllocator]:
    allocator = BlockAllocator(num_blocks)
    return BlockManager(allocator, block_size=BLOCK_SIZE, prefix_cache=prefix_cache), allocator


def make_sequence(token_ids: list[int], *, salt: str = "", max_tokens: int = 4) -> Sequence:
    return Sequence(
        request_id="a",
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        params=SamplingParams(max_tokens=max_tokens),
        submitted_at=0.0,
        cache_salt=salt,
    )


def run(manager: BlockManager, sequence: Sequence) -> int:
    """Admit, compute all tokens, confirm and release; returns how many tokens the cache had."""
    assert manager.admit(sequence, num_spare=0)
    num_hit_tokens = sequence.num_computed
    sequence.num_computed = len(sequence.token_ids)
    manager.confirm(sequence)
    manager.release(sequence, is_sound=True)
    return num_hit_tokens


@pytest.mark.parametrize(
    ("token_ids", "num_hit_tokens"),
    [
        (list(range(10)), 8),
        ([*range(8), 99, 99, 99], 8),
        (list(range(8)), 4),
        ([*range(7), 99, 99], 4),
        (list(range(4)), 0),
        ([99, *range(1, 10)], 0),
        ([*range(4, 8), *range(4, 10)], 0),
    ],
    ids=["same", "longer", "one-token-is-left", "other-second-block", "one-block", "other-first-token", "second-block"],
)
def test_leading_full_blocks_that_agree_are_hits(token_ids: list[int], num_hit_tokens: int) -> None:
    manager, _ = make_manager()
    assert run(manager, make_sequence(list(range(10)))) == 0
    assert run(manager, make_sequence(token_ids)) == num_hit_tokens


@pytest.mark.parametrize(
    "salt", ["", "key", "\ud800", "\0", "x" * 10_000], ids=["none", "key", "surrogate", "nul", "long"]
)
def test_a_salt_shares_with_itself_only(salt: str) -> None:
    manager, _ = make_manager()
    for other in ("", "key", "KEY"):
        if other != salt:
            run(manager, make_sequence(list(range(10)), salt=other))
    assert run(manager, make_sequence(list(range(10)), salt=salt)) == 0
    assert run(manager, make_sequence(list(range(10)), salt=salt)) == 8


def test_without_the_cache_nothing_is_found_and_nothing_kept() -> None:
    manager, allocator = make_manager(prefix_cache=False)
    assert [run(manager, make_sequence(list(range(10)))) for _ in range(2)] == [0, 0]
    assert allocator.num_free == 16


def test_what_is_not_confirmed_is_not_found() -> None:
    manager, allocator = make_manager()
    first, second = make_sequence(list(range(10))), make_sequence(list(range(10)))
    assert manager.admit(first, num_spare=0)
    first.num_computed = 10
    assert manager.admit(second, num_spare=0)
    assert second.num_computed == 0
    manager.confirm(first)
    manager.confirm(second)  # nothing is computed yet
    manager.check_integrity([first, second])
    assert list(first.block_table[:2]) == [allocator.find(block_hash) for block_hash in first.block_hashes]


def test_running_sequences_share_blocks_and_write_to_their_own() -> None:
    manager, allocator = make_manager(4)
    first = make_sequence(list(range(9)))
    assert manager.admit(first, num_spare=0)
    first.num_computed = 9
    manager.confirm(first)
    second = make_sequence([*range(8), 77])
    assert not manager.admit(second, num_spare=1)
    assert manager.admit(second, num_spare=0)
    assert first.block_table[:2] == second.block_table[:2]
    assert first.block_table[2] != second.block_table[2]
    manager.check_integrity([first, second])
    assert allocator.num_available == 0
    second.num_computed = 3  # as if it were to write the first block
    with pytest.raises(AssertionError, match="block 0 is shared and written to"):
        manager.check_integrity([first, second])


def test_hits_that_nobody_holds_are_not_counted_as_available_too() -> None:
    manager, allocator = make_manager(3)
    run(manager, make_sequence(list(range(12))))
    assert allocator.num_cached == 3
    again = make_sequence(list(range(12)))
    assert not manager.admit(again, num_spare=1)
    assert not again.block_table
    assert manager.admit(again, num_spare=0)
    assert again.num_computed == 8


@pytest.mark.parametrize(
    ("token_ids", "awaits"),
    [
        (list(range(12)), True),
        ([*range(8), 99], True),
        (list(range(8)), True),
        (list(range(4)), False),
        ([99] * 9, False),
    ],
    ids=["same", "longer", "last-token-is-left", "one-block", "other"],
)
def test_a_sequence_awaits_blocks_that_another_is_about_to_compute(token_ids: list[int], *, awaits: bool) -> None:
    manager, _ = make_manager()
    first, second = make_sequence(list(range(12))), make_sequence(token_ids)
    assert not manager.awaits(second, [])
    assert manager.admit(first, num_spare=0)
    assert manager.awaits(second, [first]) is awaits
    first.num_computed = 12
    manager.confirm(first)
    assert not manager.awaits(second, [first])


def test_the_end_of_a_sequence_is_given_up_before_its_beginning() -> None:
    manager, allocator = make_manager(4)
    run(manager, make_sequence(list(range(12))))
    allocator.free(allocator.allocate(2))  # the free one, and one of the cached
    assert run(manager, make_sequence(list(range(12)))) == 8
    allocator.free(allocator.allocate(3))
    assert run(manager, make_sequence(list(range(12)))) == 4
    allocator.free(allocator.allocate(4))
    assert run(manager, make_sequence(list(range(12)))) == 0


def test_nothing_of_a_sequence_that_failed_is_found_again() -> None:
    manager, allocator = make_manager()
    run(manager, make_sequence(list(range(12))))
    bad, good = make_sequence([*range(8), 66]), make_sequence([*range(8), 77])
    assert manager.admit(bad, num_spare=0)
    assert manager.admit(good, num_spare=0)
    manager.release(bad, is_sound=False)
    manager.check_integrity([good])
    assert run(manager, make_sequence(list(range(12)))) == 0
    manager.release(good, is_sound=True)
    manager.check_integrity([])
    assert allocator.num_available == 16


@pytest.mark.parametrize(("max_tokens", "grows"), [(1, False), (2, False), (3, True)])
def test_a_sequence_may_grow_until_its_last_token_but_one_has_a_block(max_tokens: int, *, grows: bool) -> None:
    manager, _ = make_manager()
    sequence = make_sequence([1, 2, 3], max_tokens=max_tokens)
    assert manager.admit(sequence, num_spare=0)
    assert manager.may_grow(sequence) is grows
    for _ in range(max_tokens - 1):
        sequence.token_ids.append(1)
        assert manager.grow(sequence)
    assert len(sequence.block_table) == (2 if grows else 1)


def test_a_sequence_that_grows_finds_no_block_when_none_is_available() -> None:
    manager, allocator = make_manager(2)
    sequence = make_sequence([1, 2, 3, 4])
    assert manager.admit(sequence, num_spare=0)
    taken = allocator.allocate(1)
    assert manager.grow(sequence)
    sequence.token_ids.append(5)
    assert not manager.grow(sequence)
    allocator.free(taken)
    assert manager.grow(sequence)
    assert list(sequence.block_table) == [0, 1]
