"""Where keys and values live: per layer one store of K and one of V, in blocks of `block_size` tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from service.engine.config import KVFormat
from service.engine.kv_stores import STORES, KVStore
from service.errors import SettingError
from service.kernels.native_attention import Stored

BLOCK_SIZE = 16
"""Tokens per KV block."""

_NUM_FIRST_BLOCKS = 16


class Capacity(NamedTuple):
    """Blocks of `BLOCK_SIZE` tokens, and sequences, that fit a memory together."""

    num_blocks: int
    num_seqs: int


def plan_capacity(
    memory_bytes: int, *, token_bytes: int, state_bytes: int, max_num_seqs: int, max_model_len: int
) -> Capacity:
    """Share memory between what grows with tokens and the states that each sequence has.

    Args:
        token_bytes: of one token; 0 if nothing grows, then blocks only count tokens and every sequence
            gets enough of them.
        state_bytes: of one sequence, whatever its length. States take at most half of the memory if
            tokens need some too; fewer sequences than `max_num_seqs` then run together.

    Raises:
        SettingError: not even one block and one state fit.
    """
    block_bytes = BLOCK_SIZE * token_bytes
    least_bytes = block_bytes + state_bytes
    if memory_bytes < least_bytes:
        state = f" and the {state_bytes} bytes of a sequence's state" if state_bytes else ""
        raise SettingError(
            f"KV memory of {memory_bytes} bytes holds no block of {BLOCK_SIZE} tokens{state}; "
            f"one takes {least_bytes} bytes; raise --kv-memory"
        )
    num_seqs = max_num_seqs
    if state_bytes:
        share = memory_bytes // 2 if token_bytes else memory_bytes
        num_seqs = max(1, min(max_num_seqs, share // state_bytes))
    if not token_bytes:
        return Capacity(num_seqs * -(-max_model_len // BLOCK_SIZE), num_seqs)
    return Capacity((memory_bytes - num_seqs * state_bytes) // block_bytes, num_seqs)


class KVBlocks:
    """Keys and values of all layers, addressed by slot (`block * block_size + offset`).

    It begins with a few blocks and learns the layers, their head counts and head sizes (K may
    differ from V, layers may differ) from the first forward; `resize` then makes the real stores.
    Their memory is not touched before it is written, so on a CPU it is resident only as far as used.
    """

    def __init__(self, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self.num_blocks = _NUM_FIRST_BLOCKS
        self._format: KVFormat = "auto"
        self._likes: dict[int, tuple[Tensor, Tensor]] = {}
        self._keys: dict[int, KVStore] = {}
        self._values: dict[int, KVStore] = {}

    @property
    def num_layers(self) -> int:
        """Layers seen so far."""
        return len(self._likes)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        head_bytes = STORES[self._format].head_bytes
        likes = (like for pair in self._likes.values() for like in pair)
        return sum(like.shape[1] * head_bytes(like.shape[2], like.dtype) for like in likes)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self.bytes_per_token * self.block_size * self.num_blocks

    def set_format(self, kv_format: KVFormat) -> None:
        """From now on store in this format; what was stored is dropped."""
        self._format = kv_format
        self.resize(self.num_blocks)

    def resize(self, num_blocks: int) -> None:
        """Make stores of `num_blocks` blocks for the layers seen so far; what was stored is dropped."""
        self.num_blocks = num_blocks
        for layer_idx, (keys, values) in self._likes.items():
            self._keys[layer_idx] = self._make_store(keys)
            self._values[layer_idx] = self._make_store(values)

    def add_layer(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Make the stores of a layer for tokens like these, unless it is known."""
        if layer_idx in self._likes:
            return
        self._likes[layer_idx] = keys.new_empty((0, *keys.shape[1:])), values.new_empty((0, *values.shape[1:]))
        self._keys[layer_idx] = self._make_store(keys)
        self._values[layer_idx] = self._make_store(values)

    def append(self, layer_idx: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store keys [T, kv_heads, dk] and values [T, kv_heads, dv] in slots int64[T]."""
        self._keys[layer_idx].write(slots, keys)
        self._values[layer_idx].write(slots, values)

    def clear(self, layer_idx: int, blocks: Tensor) -> None:
        """Fill blocks int64[n] of one layer with zeros."""
        self._keys[layer_idx].clear(blocks)
        self._values[layer_idx].clear(blocks)

    def gather(self, layer_idx: int, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Copy out whole blocks, a row of `block_tables` int64[rows, n] for each row of the result.

        Returns:
            Keys [rows, n * block_size, kv_heads, dk] and values [..., dv], in order of position, in the dtype
            that they had when they were appended.
        """
        blocks = block_tables.view(-1)
        keys, values = (stores[layer_idx].gather(blocks) for stores in (self._keys, self._values))
        shape = (len(block_tables), -1)
        return keys.view(*shape, *keys.shape[2:]), values.view(*shape, *values.shape[2:])

    def stored(self, layer_idx: int) -> tuple[Stored, Stored]:
        """Keys and values of a layer as they lie."""
        return self._keys[layer_idx].stored, self._values[layer_idx].stored

    def view(self, layer_idx: int, first_slot: int, last_slot: int) -> tuple[Tensor, Tensor]:
        """Slots `first_slot .. last_slot - 1`: [n, kv_heads, dk] and [n, kv_heads, dv]; a copy only from int8."""
        stores = self._keys[layer_idx], self._values[layer_idx]
        keys, values = (store.read(first_slot, last_slot) for store in stores)
        return keys, values

    def _make_store(self, like: Tensor) -> KVStore:
        return STORES[self._format](like, self.num_blocks, self.block_size)
