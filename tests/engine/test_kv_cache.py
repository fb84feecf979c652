"""A running engine whose keys and values are int8: memory, sharing, preemption, isolation, and what it costs in KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from service.demo import model_folder
from service.engine.attention import install
from service.engine.blocks import BLOCK_SIZE, KVBlocks
from service.engine.config import EngineConfig
from service.engine.kv_stores import decode, encode
from service.engine.probe import Probe
from service.engine.runner import Runner
from service.engine.sequence import FinishReason, SamplingParams
from service.engine.sizing import kv_memory_bytes
from service.engine.stats import EnginePath
from service.errors import SettingError
from tests.engine.families import make_unpackable
from tests.engine.kl import divergences, log_probs
from tests.engine.support import Recorder, greedy, make_model, make_prompt, running
from tests.models import NAN_TOKEN_ID, VOCAB_SIZE, build_model

EXCERPT = Path(__file__).parents[1] / "data" / "the_lost_world.txt"
MAX_KL = 0.002
"""Nats, the mean over all tokens of a text."""

INT8_BYTES_PER_BLOCK = 16 * 3 * 2 * 2 * (16 + 2)
"""Of the llama families: tokens, layers, K and V, heads, codes and scale."""


def load_demo(dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype)
    install(model)
    return model


@pytest.fixture(scope="module")
def demo() -> PreTrainedModel:
    return load_demo(torch.float32)


@pytest.fixture(scope="module")
def text_ids() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    return torch.tensor(tokenizer.encode(EXCERPT.read_text(encoding="utf-8"))[:640])


class CoarseBlocks(KVBlocks):
    """Keeps the 4 highest of the 8 bits of each code."""

    def append(self, layer_idx: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        super().append(layer_idx, _coarse(keys), _coarse(values), slots)


class ShiftedBlocks(KVBlocks):
    """Stores each key with the scale of the token before it."""

    def append(self, layer_idx: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        codes, scales = encode(keys)
        super().append(layer_idx, decode(codes, scales.roll(1, 0), keys.dtype), values, slots)


def _coarse(rows: Tensor) -> Tensor:
    codes, scales = encode(rows)
    return decode((codes.float() / 16).round() * 16, scales, rows.dtype)


def mean_kl(model: PreTrainedModel, ids: Tensor, kv: KVBlocks) -> float:
    return float(divergences(model, ids, kv).mean())


def int8_blocks(kind: type[KVBlocks] = KVBlocks) -> KVBlocks:
    kv = kind()
    kv.set_format("int8")
    return kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_keys_and_values_hardly_change_what_the_demo_model_expects(text_ids: Tensor, dtype: torch.dtype) -> None:
    assert 0 < mean_kl(load_demo(dtype), text_ids, int8_blocks()) <= MAX_KL


@pytest.mark.parametrize("kind", [CoarseBlocks, ShiftedBlocks], ids=["half-the-bits", "scales-of-others"])
def test_coarser_codes_or_wrong_scales_would_be_seen_in_the_kl(
    demo: PreTrainedModel, text_ids: Tensor, kind: type[KVBlocks]
) -> None:
    assert mean_kl(demo, text_ids, int8_blocks(kind)) > MAX_KL


def test_the_same_memory_holds_nearly_twice_the_tokens() -> None:
    """Head size 64 in 16 bit: 128 bytes against 66."""
    model = build_model("llama", dtype="bfloat16", head_dim=64)
    num_blocks, num_bytes = {}, {}
    for kv_cache in ("auto", "int8"):
        with running(model, kv_cache=kv_cache, kv_memory_bytes=1 << 22) as (engine, _):
            state = engine.state()
            num_blocks[kv_cache] = state.num_kv_blocks
            num_bytes[kv_cache] = state.kv_cache_bytes / state.num_kv_blocks / state.block_size
    assert num_blocks["int8"] >= 1.85 * num_blocks["auto"]
    assert num_bytes["int8"] <= 0.53 * num_bytes["auto"]
    assert num_bytes["int8"] == num_bytes["auto"] * 66 / 128


def test_the_bytes_that_are_reported_are_those_that_are_held() -> None:
    with running(make_model("llama"), kv_cache="int8", kv_memory_bytes=10 * INT8_BYTES_PER_BLOCK - 1) as (engine, _):
        assert engine.state().num_kv_blocks == 9
        assert engine.state().kv_cache_bytes == 9 * INT8_BYTES_PER_BLOCK


def test_without_a_wish_int8_gets_memory_for_as_many_tokens() -> None:
    model = build_model("llama", dtype="bfloat16", head_dim=64)
    auto, int8 = (
        kv_memory_bytes(model, requested=None, max_num_seqs=2, max_model_len=64, kv_cache=kv_cache)
        for kv_cache in ("auto", "int8")
    )
    assert int8 == auto * 66 / 128


@pytest.mark.parametrize("family", ["gptj", "mamba"])
def test_a_model_that_is_not_computed_packed_refuses_int8(family: str) -> None:
    message = r"--kv-cache int8: this model is computed per-request.*; use --kv-cache auto"
    with pytest.raises(SettingError, match=message), running(make_unpackable(family), kv_cache="int8"):
        pass


def test_the_probe_comes_before_int8_which_it_would_not_let_pass() -> None:
    model = make_model("llama")
    probe = Probe(model, vocab_size=VOCAB_SIZE, max_model_len=64, thorough=True)
    runner = Runner(model)
    assert probe.error(runner) <= 1
    runner.allocate(1 << 20, max_num_seqs=3, max_model_len=64, kv_cache="int8")
    assert probe.error(runner) > 1
    with running(make_model("llama"), kv_cache="int8") as (engine, _):
        assert engine.path is EnginePath.PACKED


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss", "deepseek_v3"])
def test_neighbours_do_not_change_the_tokens_of_a_sequence(family: str) -> None:
    model = make_model(family)
    prompts = [make_prompt(n) for n in (3, 40, 17)]
    with running(model, kv_cache="int8", max_num_batched_tokens=24) as (engine, recorder):
        for i, prompt in enumerate(prompts):
            engine.submit(str(i), prompt, greedy(12))
        for i in range(len(prompts)):
            recorder.end(str(i))
    for i, prompt in enumerate(prompts):
        assert recorder.tokens(str(i)) == _solo(model, prompt, greedy(12)).tokens("solo")


def test_what_the_prefix_cache_has_is_what_would_be_computed() -> None:
    """Chunks of one block each: with a hit the same chunks are left to compute, so every number is the same."""
    model = make_model("llama")
    prompt = make_prompt(70)
    params = SamplingParams(max_tokens=12, temperature=0, num_logprobs=3)
    limits: dict[str, Any] = {"kv_cache": "int8", "max_num_batched_tokens": BLOCK_SIZE}
    with running(model, **limits) as (engine, recorder):
        engine.submit("first", [*prompt[:64], 7], greedy(1))
        recorder.end("first")
        engine.submit("hit", prompt, params)
        recorder.end("hit")
        assert sum(step.num_hit_tokens for step in recorder.steps) == 64
    alone = _solo(model, prompt, params, prefix_cache=False, **limits)
    assert recorder.tokens("hit") == alone.tokens("solo")
    assert _logprobs(recorder, "hit") == _logprobs(alone, "solo")


def test_sequences_that_are_sent_back_get_the_tokens_that_they_get_alone() -> None:
    model = make_model("llama")
    prompts = [make_prompt(n) for n in (20, 7, 33, 16, 25)]
    with running(model, kv_cache="int8", kv_memory_bytes=10 * INT8_BYTES_PER_BLOCK) as (engine, recorder):
        for i, prompt in enumerate(prompts):
            engine.submit(str(i), prompt, greedy(60))
        for i in range(len(prompts)):
            assert recorder.reason(str(i)) is FinishReason.LENGTH
    assert sum(step.num_preempted for step in recorder.steps) > 0
    for i, prompt in enumerate(prompts):
        assert recorder.tokens(str(i)) == _solo(model, prompt, greedy(60)).tokens("solo")


def test_nan_in_keys_and_values_ends_its_sequence_and_no_other() -> None:
    model = build_model("faulty")
    prompt = make_prompt(18)
    with running(model, kv_cache="int8", max_num_batched_tokens=16, prefix_cache=False) as (engine, recorder):
        engine.submit("neighbour", prompt, greedy(30))
        recorder.wait_for_tokens("neighbour")
        engine.submit("bad", [NAN_TOKEN_ID, *make_prompt(40)], greedy(20))
        assert recorder.reason("bad") is FinishReason.NONFINITE
        engine.submit("heir", prompt, greedy(30))  # gets the blocks that hold NaN
        for name in ("neighbour", "heir"):
            assert recorder.reason(name) is FinishReason.LENGTH
    alone = _solo(model, prompt, greedy(30)).tokens("solo")
    assert recorder.tokens("neighbour") == recorder.tokens("heir") == alone


def test_the_format_changes_when_memory_is_allocated_and_not_before(demo: PreTrainedModel, text_ids: Tensor) -> None:
    runner = Runner(demo)
    log_probs(demo, text_ids[:16], runner.kv)
    plain = runner.kv.bytes_per_token
    capacity = runner.allocate(1 << 20, max_num_seqs=1, max_model_len=64, kv_cache="int8")
    assert plain == 6 * 2 * 2 * 64 * 4
    assert runner.kv.bytes_per_token == 6 * 2 * 2 * (64 + 2)
    assert runner.num_bytes == capacity.num_blocks * 16 * runner.kv.bytes_per_token <= 1 << 20


def test_the_configuration_of_an_engine_says_auto_unless_told_otherwise() -> None:
    assert EngineConfig(max_model_len=1, kv_memory_bytes=1, vocab_size=VOCAB_SIZE).kv_cache == "auto"


def _solo(model: PreTrainedModel, prompt: list[int], params: SamplingParams, **limits: Any) -> Recorder:
    """What one request gets that has an int8 engine for itself."""
    with running(model, **{"kv_cache": "int8", **limits}) as (engine, recorder):
        engine.submit("solo", prompt, params)
        recorder.end("solo")
    return recorder


def _logprobs(recorder: Recorder, request_id: str) -> list[object]:
    return [entry for event in recorder.events[request_id] for entry in event.logprobs]
