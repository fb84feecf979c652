"""The paths with a cache for each sequence, against transformers' own `generate`."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from service.engine.batch import Work
from service.engine.sequence import FinishReason, Sequence
from service.engine.sequential import CacheRunner
from service.engine.sizing import kv_memory_bytes
from service.engine.stats import EnginePath
from tests.conftest import Gate
from tests.engine.families import FAMILIES, make_unpackable, make_unpackable_faulty
from tests.engine.support import TIMEOUT_S, generate, greedy, make_prompt, running, solo
from tests.models import BLOCK_TOKEN_ID, NAN_TOKEN_ID, RAISE_TOKEN_ID

PROMPTS = [make_prompt(n) for n in (5, 17, 33, 1, 50)]
MAX_TOKENS = 12
WHOLE_PROMPTS = {"mamba", "llama-dynamic-rope", "phi3-longrope", "recurrent_gemma"}
GPTJ_TOKEN_BYTES = 2 * 3 * 64 * 4  # K and V, layers, width, float32


class Case(NamedTuple):
    family: str
    model: PreTrainedModel
    expected: list[list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    model = make_unpackable(request.param)
    # A fresh copy for each prompt: some families keep what the last sequence left in their modules.
    expected = [generate(copy.deepcopy(model), prompt, MAX_TOKENS) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 10, "outputs that hardly vary prove little"
    return Case(request.param, model, expected)


def test_a_sequence_alone_gets_the_tokens_of_generate(case: Case) -> None:
    with running(case.model) as (engine, recorder):
        single = case.family == "recurrent_gemma"
        assert engine.path is engine.state().path is (EnginePath.SINGLE if single else EnginePath.PER_REQUEST)
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
            recorder.end(str(i))
            assert recorder.tokens(str(i)) == case.expected[i]


@pytest.mark.parametrize("max_num_batched_tokens", [7, 512], ids=["chunks", "whole-prompts"])
def test_staggered_sequences_get_the_tokens_of_generate(case: Case, max_num_batched_tokens: int) -> None:
    with running(case.model, max_num_batched_tokens=max_num_batched_tokens) as (engine, recorder):
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
            if i % 2 == 0:
                recorder.wait_for_tokens(str(i))  # the next one meets neighbours that decode
        for i in range(len(PROMPTS)):
            recorder.end(str(i))
            assert recorder.tokens(str(i)) == case.expected[i]
        assert engine.state().kv_cache_bytes == 0
    longest_step = max(step.num_tokens for step in recorder.steps)
    if case.family in WHOLE_PROMPTS:
        assert longest_step >= len(PROMPTS[4])
    else:
        assert longest_step <= max_num_batched_tokens
    if case.family == "recurrent_gemma":
        assert {step.num_sequences for step in recorder.steps} == {1}


def test_blocks_bound_the_tokens_of_caches() -> None:
    with running(make_unpackable("gptj"), kv_memory_bytes=5 * 16 * GPTJ_TOKEN_BYTES) as (engine, recorder):
        assert engine.state().num_kv_blocks == 5
        for i in range(4):
            engine.submit(str(i), make_prompt(20), greedy(12))
        for i in range(4):
            recorder.end(str(i))
    assert max(step.num_sequences for step in recorder.steps) == 2


def test_states_that_do_not_grow_bound_the_number_of_sequences() -> None:
    model = make_unpackable("mamba2")
    runner = CacheRunner(model, path=EnginePath.PER_REQUEST, chunked=True)
    runner.forward([work_of("a", 9)])
    state_bytes = runner.num_bytes
    runner.forward([work_of("a", 90)])
    assert runner.num_bytes == state_bytes > 0
    with running(model, kv_memory_bytes=2 * state_bytes) as (engine, recorder):
        for i in range(4):
            engine.submit(str(i), make_prompt(20), greedy(12))
        for i in range(4):
            recorder.end(str(i))
    assert max(step.num_sequences for step in recorder.steps) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_kv_memory_without_being_asked(family: str) -> None:
    model = make_unpackable(family)
    with running(model, kv_memory_bytes=kv_memory_bytes(model, requested=None, max_num_seqs=4, max_model_len=64)) as (
        engine,
        recorder,
    ):
        engine.submit("a", PROMPTS[1], greedy(3))
        assert recorder.reason("a") is FinishReason.LENGTH


def work_of(request_id: str, num_tokens: int, position: int = 0) -> Work:
    token_ids = make_prompt(num_tokens)
    sequence = Sequence(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=num_tokens,
        params=greedy(1),
        submitted_at=0.0,
    )
    return Work(sequence, position, num_tokens - position)


def test_bytes_are_those_of_the_caches_that_are_held() -> None:
    runner = CacheRunner(make_unpackable("gptj"), path=EnginePath.PER_REQUEST, chunked=True)
    runner.forward([work_of("a", 9), work_of("b", 4)])
    assert runner.num_bytes == 13 * GPTJ_TOKEN_BYTES
    runner.forget("a")
    runner.forget("never seen")
    assert runner.num_bytes == 4 * GPTJ_TOKEN_BYTES


def test_a_cache_that_is_not_where_a_work_begins_is_made_again() -> None:
    runner = CacheRunner(make_unpackable("gptj"), path=EnginePath.PER_REQUEST, chunked=True)
    (expected,) = runner.forward([work_of("a", 9)])
    for position in (8, 4):  # a cache that is ahead, and one that is missing
        (logits,) = runner.forward([work_of("a", 9, position)])
        assert torch.equal(logits, expected)
        runner.forget("a")


# Isolation


NEIGHBOURS = {f"neighbour{n}": make_prompt(n) for n in (3, 18, 30)}


@pytest.fixture(scope="module")
def faulty() -> PreTrainedModel:
    return make_unpackable_faulty()


@pytest.mark.parametrize(
    ("token_id", "reason", "num_step_errors"),
    [(RAISE_TOKEN_ID, FinishReason.ERROR, 1), (NAN_TOKEN_ID, FinishReason.NONFINITE, 0)],
    ids=["exception", "nan"],
)
def test_a_fault_ends_only_the_sequence_that_caused_it(
    faulty: PreTrainedModel, token_id: int, reason: FinishReason, num_step_errors: int
) -> None:
    with running(faulty, max_num_batched_tokens=16) as (engine, recorder):
        assert engine.path is EnginePath.PER_REQUEST
        for name, prompt in NEIGHBOURS.items():
            engine.submit(name, prompt, greedy(20))
        recorder.wait_for_tokens("neighbour3")
        engine.submit("bad", [*make_prompt(20), token_id], greedy(20))
        assert recorder.reason("bad") is reason
        for name, prompt in NEIGHBOURS.items():
            assert recorder.reason(name) is FinishReason.LENGTH
            assert recorder.tokens(name) == solo(faulty, prompt, greedy(20))
    assert recorder.num_step_errors == num_step_errors


def test_an_aborted_sequence_loses_its_cache_by_the_next_step(faulty: PreTrainedModel, gate: Gate) -> None:
    with running(faulty) as (engine, recorder):
        engine.submit("a", make_prompt(4), greedy(500))
        recorder.wait_for_tokens("a", 3)
        assert engine.state().kv_cache_bytes > 0
        engine.submit("b", [BLOCK_TOKEN_ID, *make_prompt(3)], greedy(1))
        assert gate.reached.wait(TIMEOUT_S)
        engine.abort("a")
        gate.opened.set()
        assert recorder.reason("a") is FinishReason.ABORT
        assert recorder.reason("b") is FinishReason.LENGTH
        assert engine.state().kv_cache_bytes == 0
        recorder.clear()
        engine.submit("a", make_prompt(9), greedy(5))  # the id is free again, and so is its cache
        recorder.end("a")
        assert recorder.tokens("a") == solo(faulty, make_prompt(9), greedy(5))
