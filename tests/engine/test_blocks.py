from __future__ import annotations

import pytest
import torch

from service.engine.blocks import Capacity, KVBlocks, plan_capacity
from service.errors import SettingError
from tests.engine.support import BYTES_PER_BLOCK, make_model, running

KEY_SHAPE, VALUE_SHAPE = (2, 8), (2, 4)  # K and V differ, as in multi-head latent attention


def make_blocks(num_blocks: int) -> KVBlocks:
    kv = KVBlocks(block_size=4)
    kv.add_layer(0, torch.zeros(1, *KEY_SHAPE), torch.zeros(1, *VALUE_SHAPE))
    kv.add_layer(1, torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
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
    with running(make_model(family), kv_memory_bytes=10 * ratio * BYTES_PER_BLOCK - 1) as (engine, _):
        state = engine.state()
    assert state.num_kv_blocks == 9
    assert state.kv_cache_bytes == 9 * ratio * BYTES_PER_BLOCK


def plan(memory_bytes: int, token_bytes: int, state_bytes: int) -> Capacity:
    return plan_capacity(
        memory_bytes, token_bytes=token_bytes, state_bytes=state_bytes, max_num_seqs=4, max_model_len=40
    )


def test_states_leave_half_of_the_memory_to_tokens() -> None:
    assert plan(100_000, 10, 1000) == Capacity(num_blocks=96_000 // 160, num_seqs=4)
    assert plan(6_000, 10, 1000) == Capacity(num_blocks=3_000 // 160, num_seqs=3)
    assert plan(1_160, 10, 1000) == Capacity(num_blocks=1, num_seqs=1)


def test_where_nothing_grows_with_tokens_only_the_states_are_bounded() -> None:
    assert plan(100_000, 0, 1000) == Capacity(num_blocks=4 * 3, num_seqs=4)
    assert plan(2_999, 0, 1000) == Capacity(num_blocks=2 * 3, num_seqs=2)
    assert plan(1, 0, 0) == Capacity(num_blocks=4 * 3, num_seqs=4)


def test_memory_below_one_block_is_refused() -> None:
    with pytest.raises(SettingError, match=r"KV memory of 159 bytes holds .* one takes 160 bytes; raise --kv-memory"):
        plan(159, 10, 0)
    with pytest.raises(SettingError, match="and the 1000 bytes of a sequence's state; one takes 1160 bytes; raise"):
        plan(1159, 10, 1000)
