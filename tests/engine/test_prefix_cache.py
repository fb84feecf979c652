"""Shared KV blocks in a running engine, against transformers' own `generate`."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from service.engine.sequence import FinishReason, SamplingParams
from service.engine.stats import EnginePath
from tests.conftest import Gate
from tests.engine.families import make_unpackable
from tests.engine.support import (
    BYTES_PER_BLOCK,
    TIMEOUT_S,
    Recorder,
    generate,
    greedy,
    make_model,
    make_prompt,
    running,
    solo,
)
from tests.models import BLOCK_TOKEN_ID, NAN_TOKEN_ID, build_model

BASE = make_prompt(70)
PROMPTS = [[*BASE, *make_prompt(n, seed=n)] for n in (3, 20, 1)] + [BASE[:64], BASE[:40]]
NUM_HITS = [0, 64, 64, 48, 32]
"""Tokens that the prompt before them left in full blocks of 16; of a prompt of 64, the last is left to compute."""
MAX_TOKENS = 12


def hits(recorder: Recorder) -> list[int]:
    """Tokens that the cache had, of each sequence in the order of admission, if each came alone."""
    return [step.num_hit_tokens for step in recorder.steps if step.queue_s]


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral", "gemma2", "gpt-oss"])
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, list[list[int]]]:
    model = make_model(request.param)
    return model, [generate(model, prompt, MAX_TOKENS) for prompt in PROMPTS]


def test_prompts_that_begin_alike_share_blocks_and_get_the_tokens_of_generate(
    case: tuple[PreTrainedModel, list[list[int]]],
) -> None:
    model, expected = case
    with running(model) as (engine, recorder):
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
            recorder.end(str(i))
        assert hits(recorder) == NUM_HITS
        for i, prompt in enumerate(PROMPTS):  # and now all together, from the cache
            engine.submit(f"again{i}", prompt, greedy(MAX_TOKENS))
        for i in range(len(PROMPTS)):
            recorder.end(f"again{i}")
            assert recorder.tokens(str(i)) == recorder.tokens(f"again{i}") == expected[i]


def test_prompts_that_come_together_share_what_the_first_computes(
    case: tuple[PreTrainedModel, list[list[int]]],
) -> None:
    model, expected = case
    with running(model, max_num_batched_tokens=32) as (engine, recorder):
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
        for i in range(len(PROMPTS)):
            recorder.end(str(i))
            assert recorder.tokens(str(i)) == expected[i]
    assert sum(step.num_hit_tokens for step in recorder.steps) == sum(NUM_HITS)


def test_without_the_cache_nothing_is_shared_and_tokens_are_the_same(
    case: tuple[PreTrainedModel, list[list[int]]],
) -> None:
    model, expected = case
    with running(model, prefix_cache=False) as (engine, recorder):
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
            recorder.end(str(i))
            assert recorder.tokens(str(i)) == expected[i]
        assert hits(recorder) == [0] * len(PROMPTS)
        assert engine.state().num_cached_kv_blocks == 0


def test_a_prompt_that_goes_on_from_an_answer_finds_the_answer_too() -> None:
    model = make_model("llama")
    with running(model) as (engine, recorder):
        engine.submit("first", BASE, greedy(30))
        recorder.end("first")
        dialogue = [*BASE, *recorder.tokens("first"), *make_prompt(5, seed=9)]
        engine.submit("second", dialogue, greedy(MAX_TOKENS))
        recorder.end("second")
    assert hits(recorder) == [0, 96]  # of 70 prompt and 29 computed answer tokens
    assert recorder.tokens("second") == generate(model, dialogue, MAX_TOKENS)


def test_a_salt_keeps_prompts_from_those_of_another() -> None:
    with running(make_model("llama")) as (engine, recorder):
        for number, salt in enumerate(("a", "b", "", "a", "b", "")):
            engine.submit(str(number), BASE, greedy(2), cache_salt=salt)
            recorder.end(str(number))
    assert hits(recorder) == [0, 0, 0, 64, 64, 64]
    assert len({tuple(recorder.tokens(str(number))) for number in range(6)}) == 1


def test_nothing_of_a_nan_sequence_is_found_again() -> None:
    model = build_model("faulty")
    with running(model, max_num_batched_tokens=16) as (engine, recorder):
        engine.submit("before", BASE, greedy(2))
        recorder.end("before")
        engine.submit("bad", [*BASE[:40], NAN_TOKEN_ID, *BASE], greedy(2))
        assert recorder.reason("bad") is FinishReason.NONFINITE
        engine.submit("same", [*BASE[:40], NAN_TOKEN_ID, *BASE], greedy(2))
        assert recorder.reason("same") is FinishReason.NONFINITE
        engine.submit("after", BASE, greedy(20))
        recorder.end("after")
        assert hits(recorder) == [0, 32, 0, 0]  # the blocks that "bad" shared are not trusted any more
        assert recorder.tokens("after") == solo(model, BASE, greedy(20))


def test_blocks_of_a_sequence_that_is_aborted_while_others_share_them_stay(gate: Gate) -> None:
    model = build_model("faulty")
    with running(model) as (engine, recorder):
        engine.submit("first", BASE, greedy(400))
        recorder.wait_for_tokens("first")
        engine.submit("second", [*BASE, BLOCK_TOKEN_ID], greedy(20))
        assert gate.reached.wait(TIMEOUT_S)
        engine.abort("first")
        gate.opened.set()
        assert recorder.reason("first") is FinishReason.ABORT
        assert recorder.reason("second") is FinishReason.LENGTH
        assert recorder.tokens("second") == solo(model, [*BASE, BLOCK_TOKEN_ID], greedy(20))
        assert hits(recorder) == [0, 64]


def test_a_cache_that_is_too_small_for_all_prompts_changes_no_token() -> None:
    model = make_model("llama")
    prompts = [[*BASE[: 16 * (n % 5)], *make_prompt(20 + n, seed=n)] for n in range(12)]
    with running(model, kv_memory_bytes=16 * BYTES_PER_BLOCK) as (engine, recorder):
        for turn in range(2):
            for i, prompt in enumerate(prompts):
                engine.submit(f"{turn}-{i}", prompt, greedy(MAX_TOKENS))
            for i in range(len(prompts)):
                recorder.end(f"{turn}-{i}")
        assert sum(step.num_hit_tokens for step in recorder.steps) > 0
    for i, prompt in enumerate(prompts):
        expected = generate(model, prompt, MAX_TOKENS)
        assert recorder.tokens(f"0-{i}") == recorder.tokens(f"1-{i}") == expected


def test_seeded_sampling_is_the_same_with_a_cached_prompt() -> None:
    params = SamplingParams(max_tokens=30, temperature=1.2, top_p=0.9, seed=5)
    with running(make_model("llama")) as (engine, recorder):
        for name in ("cold", "cached"):
            engine.submit(name, BASE, params)
            recorder.end(name)
    assert hits(recorder) == [0, 64]
    assert recorder.tokens("cold") == recorder.tokens("cached")


def test_caches_of_each_request_share_nothing() -> None:
    model = make_unpackable("bloom")
    with running(model) as (engine, recorder):
        assert engine.path is EnginePath.PER_REQUEST
        for name in "ab":
            engine.submit(name, BASE, greedy(MAX_TOKENS))
            recorder.end(name)
        assert engine.state().num_cached_kv_blocks == 0
    assert hits(recorder) == [0, 0]
    assert recorder.tokens("a") == recorder.tokens("b")
