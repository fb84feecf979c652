"""Which KV blocks are held, cached or free. No torch."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockAllocator:
    """Hands out KV blocks `0 .. num_blocks - 1`, neighbours where it can.

    A block that nobody holds is cached if it was published under a hash, else free. Cached blocks are
    handed out again when no free one is left, the least recently used first.

    A sequence whose blocks follow one another is read without a copy, so the first run of free
    blocks that is long enough is preferred to scattered ones.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_holders = [0] * num_blocks
        self._is_taken = bytearray(num_blocks)  # held or cached
        self._num_free = num_blocks
        # In order of use; the first of a dict is found behind all that was removed before it.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hashes: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and that store nothing of use."""
        return self._num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that can be found by their hash."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return self._num_free + len(self._cached)

    def num_holders(self, block: int) -> int:
        """How many hold a block."""
        return self._num_holders[block]

    def hash_of(self, block: int) -> bytes | None:
        """The hash that a block is published under."""
        return self._hashes.get(block)

    def find(self, block_hash: bytes) -> int | None:
        """The block that is published under a hash."""
        return self._published.get(block_hash)

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Take `count` blocks, at most `num_available`; behind block `after` if these are free, and in rising order."""
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} are available"
        while self._num_free < count:
            self.unpublish(next(iter(self._cached)))
        start = -1
        if after is not None and self._is_taken[after + 1 : after + 1 + count] == bytes(count):
            start = after + 1
        if start < 0:
            start = self._is_taken.find(bytes(count))
        blocks = list(range(start, start + count)) if start >= 0 else self._scattered(count)
        for block in blocks:
            self._num_holders[block] = 1
            self._is_taken[block] = 1
        self._num_free -= count
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Hold published blocks once more."""
        for block in blocks:
            self._num_holders[block] += 1
            self._cached.pop(block, None)

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each block; of those that become cached, the first will be handed out first."""
        for block in blocks:
            assert self._num_holders[block], f"block {block} is freed twice"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._hashes:
                self._cached[block] = None
            else:
                self._is_taken[block] = 0
                self._num_free += 1

    def publish(self, block: int, block_hash: bytes) -> None:
        """Let a held block be found by a hash, unless another one is."""
        assert self._num_holders[block], f"block {block} is published and not held"
        assert block not in self._hashes, f"block {block} is published twice"
        if self._published.setdefault(block_hash, block) == block:
            self._hashes[block] = block_hash

    def unpublish(self, block: int) -> None:
        """Let a block be found no more; a cached one is free then."""
        block_hash = self._hashes.pop(block, None)
        if block_hash is None:
            return
        del self._published[block_hash]
        if block in self._cached:
            del self._cached[block]
            self._is_taken[block] = 0
            self._num_free += 1

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that blocks are held as often as they are in `held`, and that the others are cached or free."""
        counts = Counter(held)
        expected = [0] * self.num_blocks
        for block, count in counts.items():
            expected[block] = count
        assert self._num_holders == expected, f"holders, expected: {_differences(self._num_holders, expected)}"
        taken = (*self._cached, *counts)
        assert len(set(taken)) == len(taken), "a block is cached that is held"
        assert all(map(self._is_taken.__getitem__, taken)), "a block counts as free that is held or cached"
        assert self._is_taken.count(1) == len(taken) == self.num_blocks - self._num_free, "a block is lost"
        assert set(taken) >= self._hashes.keys() >= self._cached.keys(), "a block has a hash that is free, or none"
        blocks = dict(zip(self._hashes.values(), self._hashes, strict=True))
        assert self._published == blocks, "a hash leads to another block"

    def _scattered(self, count: int) -> list[int]:
        blocks: list[int] = []
        block = -1
        for _ in range(count):
            block = self._is_taken.find(0, block + 1)
            blocks.append(block)
        return blocks


def _differences(actual: Sequence[int], expected: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Both values, by index, where they are not equal."""
    pairs = enumerate(zip(actual, expected, strict=True))
    return {index: pair for index, pair in pairs if pair[0] != pair[1]}
