from __future__ import annotations

import pytest
import torch

from service.engine.blocks import KVBlocks
from service.engine.runner import Runner
from service.errors import SettingError
from tests.engine.support import BYTES_PER_BLOCK, make_model

KEY_SHAPE, VALUE_SHAPE = (2, 8), (2, 4)  # K and V differ, as in multi-head latent attention


def make_blocks(num_blocks: int) -> KVBlocks:
    kv = KVBlocks(block_size=4)
    kv.append(0, torch.zeros(1, *KEY_SHAPE), torch.zeros(1, *VALUE_SHAPE), torch.tensor([0]))
    kv.append(1, torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), torch.tensor([0]))
    kv.resize(num_blocks)
    return kv


def test_bytes_per_token_are_the_sum_over_layers_of_their_own_shapes() -> None:
    kv = make_blocks(3)
    assert kv.num_layers == 2
    assert kv.bytes_per_token == 4 * (2 * 8 + 2 * 4 + 8 + 8)
    assert kv.num_bytes == kv.bytes_per_token * 4 * 3


def test_gather_returns_tokens_in_order_of_position() -> None:
    kv = make_blocks(5)
    keys, values = torch.randn(8, *KEY_SHAPE), torch.randn(8, *VALUE_SHAPE)
    table = [3, 1]
    slots = torch.tensor([table[position // 4] * 4 + position % 4 for position in range(8)])
    kv.append(0, keys, values, slots)
    stored_keys, stored_values = kv.gather(0, torch.tensor([table, [1, 3]]))
    assert torch.equal(stored_keys, torch.stack((keys, torch.cat((keys[4:], keys[:4])))))
    assert torch.equal(stored_values[0], values)


def test_view_shares_memory_with_the_store() -> None:
    kv = make_blocks(2)
    kv.append(0, torch.ones(8, *KEY_SHAPE), torch.ones(8, *VALUE_SHAPE), torch.arange(8))
    keys, values = kv.view(0, 2, 7)
    kv.clear(0, torch.tensor([1]))
    assert keys[:, 0, 0].tolist() == values[:, 0, 0].tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(("family", "ratio"), [("llama", 1), ("gpt2", 2)], ids=["2-kv-heads", "4-kv-heads"])
def test_as_many_blocks_are_made_as_the_memory_holds(family: str, ratio: int) -> None:
    runner = Runner(make_model(family), 10 * ratio * BYTES_PER_BLOCK - 1)
    assert runner.kv.num_blocks == 9
    assert runner.kv.num_bytes == 9 * ratio * BYTES_PER_BLOCK


def test_memory_below_one_block_is_refused() -> None:
    message = f"KV memory of {BYTES_PER_BLOCK - 1} bytes .* one takes {BYTES_PER_BLOCK} bytes; raise --kv-memory"
    with pytest.raises(SettingError, match=message):
        Runner(make_model("llama"), BYTES_PER_BLOCK - 1)
