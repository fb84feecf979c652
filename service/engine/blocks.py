"""Where keys and values live: per layer one store of K and one of V, in blocks of `block_size` tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from service.errors import SettingError

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
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def num_layers(self) -> int:
        """Layers seen so far."""
        return len(self._keys)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        stores = (*self._keys.values(), *self._values.values())
        return sum(store[0].numel() * store.element_size() for store in stores)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self.bytes_per_token * self.block_size * self.num_blocks

    def resize(self, num_blocks: int) -> None:
        """Make stores of `num_blocks` blocks for the layers seen so far; what was stored is dropped."""
        self.num_blocks = num_blocks
        for stores in (self._keys, self._values):
            for layer_idx, store in stores.items():
                stores[layer_idx] = store.new_empty((num_blocks * self.block_size, *store.shape[1:]))

    def add_layer(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Make the stores of a layer for tokens like these, unless it is known."""
        if layer_idx in self._keys:
            return
        num_slots = self.num_blocks * self.block_size
        self._keys[layer_idx] = keys.new_empty((num_slots, *keys.shape[1:]))
        self._values[layer_idx] = values.new_empty((num_slots, *values.shape[1:]))

    def append(self, layer_idx: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store keys [T, kv_heads, dk] and values [T, kv_heads, dv] in slots int64[T]."""
        self._keys[layer_idx].index_copy_(0, slots, keys)
        self._values[layer_idx].index_copy_(0, slots, values)

    def clear(self, layer_idx: int, blocks: Tensor) -> None:
        """Fill blocks int64[n] of one layer with zeros."""
        for store in (self._keys[layer_idx], self._values[layer_idx]):
            store.view(self.num_blocks, -1).index_fill_(0, blocks, 0)

    def gather(self, layer_idx: int, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Copy out whole blocks, a row of `block_tables` int64[rows, n] for each row of the result.

        Returns:
            Keys [rows, n * block_size, kv_heads, dk] and values [..., dv], in order of position.
        """
        return self._gather(self._keys[layer_idx], block_tables), self._gather(self._values[layer_idx], block_tables)

    def view(self, layer_idx: int, first_slot: int, last_slot: int) -> tuple[Tensor, Tensor]:
        """Slots `first_slot .. last_slot - 1` without a copy: [n, kv_heads, dk] and [n, kv_heads, dv]."""
        return self._keys[layer_idx][first_slot:last_slot], self._values[layer_idx][first_slot:last_slot]

    def _gather(self, store: Tensor, block_tables: Tensor) -> Tensor:
        rows, num_blocks = block_tables.shape
        blocks = store.view(self.num_blocks, -1).index_select(0, block_tables.view(-1))
        return blocks.view(rows, num_blocks * self.block_size, *store.shape[1:])
