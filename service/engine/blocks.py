"""Where keys and values live: per layer one store of K and one of V, in blocks of `block_size` tokens."""

from __future__ import annotations

from torch import Tensor

BLOCK_SIZE = 16
"""Tokens per KV block."""


class KVBlocks:
    """Keys and values of all layers, addressed by slot (`block * block_size + offset`).

    It begins with a single block and learns the layers, their head counts and head sizes (K may
    differ from V, layers may differ) from the first forward; `resize` then makes the real stores.
    Their memory is not touched before it is written, so on a CPU it is resident only as far as used.
    """

    def __init__(self, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self.num_blocks = 1
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
        """Make the stores of a layer that is not known yet, for tokens like these."""
        num_slots = self.num_blocks * self.block_size
        self._keys[layer_idx] = keys.new_empty((num_slots, *keys.shape[1:]))
        self._values[layer_idx] = values.new_empty((num_slots, *values.shape[1:]))

    def append(self, layer_idx: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store keys [T, kv_heads, dk] and values [T, kv_heads, dv] in slots int64[T]."""
        if layer_idx not in self._keys:
            self.add_layer(layer_idx, keys, values)
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
