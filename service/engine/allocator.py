"""Which KV blocks are free. No torch."""

from __future__ import annotations

from collections.abc import Iterable


class BlockAllocator:
    """Hands out KV blocks `0 .. num_blocks - 1`, neighbours where it can.

    A sequence whose blocks follow one another is read without a copy, so the first run of free
    blocks that is long enough is preferred to scattered ones.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._used = bytearray(num_blocks)
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self._num_free

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, at most `num_free`, in rising order."""
        assert count <= self._num_free, f"{count} blocks wanted, {self._num_free} are free"
        start = self._used.find(bytes(count))
        if start >= 0:
            blocks = list(range(start, start + count))
        else:
            blocks = [block for block, used in enumerate(self._used) if not used][:count]
        for block in blocks:
            self._used[block] = 1
        self._num_free -= count
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back; each must be in use."""
        for block in blocks:
            assert self._used[block], f"block {block} is freed twice"
            self._used[block] = 0
            self._num_free += 1

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that exactly the blocks in `held` are in use, each held once."""
        held = sorted(held)
        used = [block for block, is_used in enumerate(self._used) if is_used]
        assert held == used, f"blocks in use: {used}, held: {held}"
        assert self._num_free == self.num_blocks - len(used)
