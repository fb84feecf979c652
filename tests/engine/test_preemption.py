"""A running engine with too few KV blocks: sequences wait, are computed again, and get the same tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from service.engine.sequence import FinishReason, SamplingParams
from tests.engine.families import make_unpackable
from tests.engine.support import (
    BYTES_PER_BLOCK,
    Recorder,
    generate,
    greedy,
    make_model,
    make_prompt,
    running,
    solo,
)

PROMPTS = [make_prompt(n) for n in (20, 7, 33, 16, 25)]
MAX_TOKENS = 60
NUM_BLOCKS = 10
"""Two sequences of at most 93 tokens fit, in blocks of 16; to begin with, all five do nearly."""


@cache
def expected(family: str) -> list[list[int]]:
    """What `generate` gives for each prompt."""
    return [generate(make_model(family), prompt, MAX_TOKENS) for prompt in PROMPTS]


def num_preempted(recorder: Recorder) -> int:
    return sum(step.num_preempted for step in recorder.steps)


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("max_num_batched_tokens", [7, 512], ids=["chunks", "whole-prompts"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sequences_that_are_sent_back_get_the_tokens_of_generate(
    family: str, max_num_batched_tokens: int, *, prefix_cache: bool
) -> None:
    model = make_model(family)
    limits: dict[str, Any] = {"max_num_batched_tokens": max_num_batched_tokens, "prefix_cache": prefix_cache}
    with running(model, kv_memory_bytes=NUM_BLOCKS * BYTES_PER_BLOCK, **limits) as (engine, recorder):
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
        ends = [recorder.end(str(i)) for i in range(len(PROMPTS))]
    assert num_preempted(recorder) > 0
    assert sum(len(step.queue_s) for step in recorder.steps) == len(PROMPTS)
    assert sum(len(step.first_token_s) for step in recorder.steps) == len(PROMPTS)
    assert {end.finish_reason for end in ends} == {FinishReason.LENGTH}
    assert [recorder.tokens(str(i)) for i in range(len(PROMPTS))] == expected(family)


def test_with_enough_blocks_nobody_is_sent_back() -> None:
    with running(make_model("llama"), kv_memory_bytes=40 * BYTES_PER_BLOCK) as (engine, recorder):
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
        for i in range(len(PROMPTS)):
            recorder.end(str(i))
    assert num_preempted(recorder) == 0


def test_a_seeded_sequence_that_is_sent_back_samples_the_same_tokens() -> None:
    model = make_model("llama")
    params = [SamplingParams(max_tokens=MAX_TOKENS, temperature=1.1, top_p=0.9, seed=i) for i in range(len(PROMPTS))]
    with running(model, kv_memory_bytes=NUM_BLOCKS * BYTES_PER_BLOCK) as (engine, recorder):
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, params[i])
        for i in range(len(PROMPTS)):
            recorder.end(str(i))
    assert num_preempted(recorder) > 0
    for i, prompt in enumerate(PROMPTS):
        assert recorder.tokens(str(i)) == solo(model, prompt, params[i])


def test_one_sequence_may_take_all_blocks() -> None:
    model = make_model("llama")
    with running(model, kv_memory_bytes=4 * BYTES_PER_BLOCK) as (engine, recorder):
        for name in ("first", "second"):
            engine.submit(name, make_prompt(30), greedy(34))
        for name in ("first", "second"):
            assert recorder.reason(name) is FinishReason.LENGTH
    assert recorder.tokens("first") == recorder.tokens("second") == generate(model, make_prompt(30), 34)


def test_an_abort_of_a_sequence_that_was_sent_back_ends_it_at_once() -> None:
    with running(make_model("llama"), kv_memory_bytes=NUM_BLOCKS * BYTES_PER_BLOCK) as (engine, recorder):
        for name in ("old", "young"):
            engine.submit(name, make_prompt(16), greedy(144))
        while num_preempted(recorder) == 0:
            recorder.wait_for_tokens("old", len(recorder.tokens("old")) + 1)
        engine.abort("young")
        assert recorder.reason("young") is FinishReason.ABORT
        assert 0 < len(recorder.tokens("young")) < 144
        assert recorder.reason("old") is FinishReason.LENGTH
        assert len(recorder.tokens("old")) == 144


def test_a_request_that_is_sent_back_gives_up_its_cache_of_transformers() -> None:
    model = make_unpackable("gptj")
    num_bytes = NUM_BLOCKS * 16 * 3 * 2 * 64 * 4  # tokens, layers, K and V, width, float32
    with running(model, kv_memory_bytes=num_bytes) as (engine, recorder):
        assert engine.state().num_kv_blocks == NUM_BLOCKS
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
        for num_tokens in range(1, MAX_TOKENS):
            recorder.wait_for_tokens("0", num_tokens)
            assert engine.state().kv_cache_bytes <= num_bytes
        for i in range(len(PROMPTS)):
            recorder.end(str(i))
        assert engine.state().kv_cache_bytes == 0
    assert num_preempted(recorder) > 0
    for i, prompt in enumerate(PROMPTS):
        assert recorder.tokens(str(i)) == generate(model, prompt, MAX_TOKENS)
