"""Which blocks a sequence has, and which of them it shares: the prefix cache. No torch.

A full block is found by a chain of hashes: of its token ids and of the block before it, down to the
salt. So a block is shared only by sequences that agree in every token up to its end, and in the salt.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable

from service.engine.allocator import BlockAllocator
from service.engine.sequence import Sequence


class BlockManager:
    """Gives blocks to sequences and takes them back.

    A sequence writes only behind its `num_computed` tokens, and only blocks before these are
    published. So nobody ever writes to a block that another one reads.

    With `prefix_cache`, blocks are published when finite logits have been seen behind them, and are
    never found again if their sequence fails.
    """

    def __init__(self, allocator: BlockAllocator, *, block_size: int, prefix_cache: bool) -> None:
        self.block_size = block_size
        self._allocator = allocator
        self._prefix_cache = prefix_cache

    def admit(self, sequence: Sequence, *, num_spare: int) -> bool:
        """Give a sequence blocks for all its tokens, if `num_spare` blocks stay available; says whether.

        It then begins behind the tokens that the cache has; those whose logits it needs are left to compute.
        """
        hits = self._find_hits(sequence)
        num_missing = self._num_blocks_of(len(sequence.token_ids)) - len(hits)
        num_idle_hits = sum(self._allocator.num_holders(block) == 0 for block in hits)
        if num_missing + num_spare > self._allocator.num_available - num_idle_hits:
            return False
        self._allocator.share(hits)
        missing = self._allocator.allocate(num_missing, after=hits[-1] if hits else None)
        sequence.block_table = array("q", hits + missing)
        sequence.num_computed = sequence.num_confirmed = len(hits) * self.block_size
        return True

    def awaits(self, sequence: Sequence, others: Iterable[Sequence]) -> bool:
        """Whether one of `others` is about to compute the first block that the cache does not have for a sequence."""
        index = len(self._find_hits(sequence))
        position = index * self.block_size
        if not self._prefix_cache or index == self._num_shareable_blocks(sequence):
            return False
        block_hash = sequence.block_hashes[index]
        return any(
            other.num_confirmed <= position and other.block_hashes[index : index + 1] == [block_hash]
            for other in others
        )

    def grow(self, sequence: Sequence) -> bool:
        """Give a decoding sequence a block for its last token if it has none; False if none is available."""
        table = sequence.block_table
        if len(sequence.token_ids) <= len(table) * self.block_size:
            return True
        if self._allocator.num_available == 0:
            return False
        table.extend(self._allocator.allocate(1, after=table[-1]))
        return True

    def may_grow(self, sequence: Sequence) -> bool:
        """Whether an admitted sequence can come to need another block; the last token it generates needs none."""
        most = sequence.num_prompt_tokens + sequence.params.max_tokens - 1
        return self._num_blocks_of(most) > self._num_blocks_of(len(sequence.token_ids))

    def confirm(self, sequence: Sequence) -> None:
        """Publish the full blocks behind which finite logits have been seen now."""
        first, stop = sequence.num_confirmed // self.block_size, sequence.num_computed // self.block_size
        sequence.num_confirmed = sequence.num_computed
        if first < stop and self._prefix_cache:
            self._extend_hashes(sequence, stop)
            for index in range(first, stop):
                self._allocator.publish(sequence.block_table[index], sequence.block_hashes[index])

    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Take the blocks back; of a sequence that is not sound none is found again.

        The last block is given up first, because it is of no use without those before it.
        """
        if not is_sound:
            for block in sequence.block_table:
                self._allocator.unpublish(block)
        self._allocator.free(reversed(sequence.block_table))
        sequence.block_table = array("q")
        sequence.num_computed = sequence.num_confirmed = 0

    def check_integrity(self, sequences: Collection[Sequence]) -> None:
        """Assert that blocks are held by exactly these sequences, and shared only where nobody writes."""
        self._allocator.check_integrity(block for sequence in sequences for block in sequence.block_table)
        for sequence in sequences:
            num_confirmed = sequence.num_confirmed // self.block_size
            num_computed = sequence.num_computed // self.block_size
            for index, block in enumerate(sequence.block_table):
                block_hash = self._allocator.hash_of(block)
                if index >= num_confirmed:
                    assert block_hash is None, f"block {block} is published and not confirmed"
                elif block_hash is not None:
                    assert block_hash == sequence.block_hashes[index], f"block {block} has the hash of another"
                if index >= num_computed:
                    assert self._allocator.num_holders(block) == 1, f"block {block} is shared and written to"

    def _find_hits(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the leading tokens, up to the first one whose logits are needed."""
        hits: list[int] = []
        if self._prefix_cache:
            num_blocks = self._num_shareable_blocks(sequence)
            self._extend_hashes(sequence, num_blocks)
            for block_hash in sequence.block_hashes[:num_blocks]:
                block = self._allocator.find(block_hash)
                if block is None:
                    break
                hits.append(block)
        return hits

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        parent = hashes[-1] if hashes else _root_hash(sequence.cache_salt)
        for start in range(len(hashes) * size, num_blocks * size, size):
            token_ids = array("q", sequence.token_ids[start : start + size])
            parent = hashlib.sha256(parent + token_ids.tobytes()).digest()
            hashes.append(parent)

    def _num_shareable_blocks(self, sequence: Sequence) -> int:
        num_tokens = sequence.num_scored if sequence.num_to_score else len(sequence.token_ids) - 1
        return num_tokens // self.block_size

    def _num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def _root_hash(salt: str) -> bytes:
    """What the chain of a salt begins with; hashed twice, so that no salt can pass for a block."""
    digest = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
    return hashlib.sha256(digest).digest()
