"""Log-probabilities of prompts in a running engine, against one forward of transformers in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from service.engine.logprobs import max_scored_tokens
from service.engine.sequence import FinishReason, SamplingParams, TokenLogprobs
from tests.engine.families import make_unpackable
from tests.engine.support import BYTES_PER_BLOCK, Recorder, generate, greedy, make_model, make_prompt, running
from tests.models import NAN_TOKEN_ID, RAISE_TOKEN_ID, build_model

TOLERANCE = 1e-4
"""Both compute in float32, in different orders; logits are below 20, and 1e-4 is 50 roundings of them."""
PROMPTS = [make_prompt(n) for n in (70, 1, 33, 2, 16)]
MAX_TOKENS = 5


def scoring(max_tokens: int = 0, num_prompt_logprobs: int = 3) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, num_prompt_logprobs=num_prompt_logprobs)


def told(recorder: Recorder, request_id: str) -> list[TokenLogprobs]:
    return [one for event in recorder.events[request_id] for one in event.prompt_logprobs]


def assert_right(model: PreTrainedModel, prompt: list[int], found: list[TokenLogprobs], count: int = 3) -> None:
    """Compare with the model's own forward over the whole prompt."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)[:-1]
    assert len(found) == len(prompt) - 1
    for one, row, token_id in zip(found, expected, prompt[1:], strict=True):
        assert one.logprob == pytest.approx(row[token_id].item(), abs=TOLERANCE)
        top = row.topk(count)
        assert [value for _, value in one.top] == pytest.approx(top.values.tolist(), abs=TOLERANCE)
        assert [row[i].item() for i, _ in one.top] == pytest.approx(top.values.tolist(), abs=TOLERANCE)


PACKED = ["llama", "gemma2"]
UNPACKABLE = ["gptj", "llama-dynamic-rope", "recurrent_gemma"]
"""Computed per request, per request with whole prompts, and one sequence at a time."""


@pytest.fixture(scope="module", params=PACKED + UNPACKABLE)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param) if request.param in PACKED else make_unpackable(request.param)


@pytest.mark.parametrize(
    ("max_num_batched_tokens", "max_num_scored"),
    [(7, None), (512, None), (512, 12)],
    ids=["chunks", "whole-prompts", "few-scored-at-once"],
)
def test_prompts_are_scored_as_by_one_forward_next_to_others_that_decode(
    model: PreTrainedModel, max_num_batched_tokens: int, max_num_scored: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if max_num_scored is not None:
        monkeypatch.setattr("service.engine.engine.max_scored_tokens", lambda _: max_num_scored)
    with running(copy.deepcopy(model), max_num_batched_tokens=max_num_batched_tokens) as (engine, recorder):
        engine.submit("neighbour", make_prompt(20), greedy(40))
        for i, prompt in enumerate(PROMPTS):
            engine.submit(f"scored{i}", prompt, scoring())
            engine.submit(f"both{i}", prompt, scoring(MAX_TOKENS, 0))
        for i, prompt in enumerate(PROMPTS):
            end = recorder.end(f"scored{i}")
            assert (end.finish_reason, recorder.tokens(f"scored{i}")) == (FinishReason.LENGTH, [])
            assert end.timings is not None
            assert end.timings.first_token_s is None
            assert_right(model, prompt, told(recorder, f"scored{i}"))
            recorder.end(f"both{i}")
            assert recorder.tokens(f"both{i}") == generate(model, prompt, MAX_TOKENS)
            assert [one.logprob for one in told(recorder, f"both{i}")] == pytest.approx(
                [one.logprob for one in told(recorder, f"scored{i}")], abs=TOLERANCE
            )
            assert all(one.top == () for one in told(recorder, f"both{i}"))
        recorder.end("neighbour")
        assert recorder.tokens("neighbour") == generate(model, make_prompt(20), 40)


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no-cache"])
def test_a_prompt_whose_blocks_are_cached_is_scored_all_the_same(*, prefix_cache: bool) -> None:
    model, prompt = make_model("llama"), PROMPTS[0]
    with running(model, prefix_cache=prefix_cache) as (engine, recorder):
        for name, params in (("a", greedy(MAX_TOKENS)), ("b", scoring()), ("c", scoring(MAX_TOKENS))):
            engine.submit(name, prompt, params)
            recorder.end(name)
    assert_right(model, prompt, told(recorder, "b"))
    assert_right(model, prompt, told(recorder, "c"))
    assert recorder.tokens("c") == recorder.tokens("a") == generate(model, prompt, MAX_TOKENS)
    assert sum(step.num_hit_tokens for step in recorder.steps) == 0


@pytest.mark.parametrize("max_tokens", [0, 1], ids=["nothing", "one-token"])
def test_what_scoring_computes_is_found_by_others(max_tokens: int) -> None:
    model, prompt = make_model("llama"), PROMPTS[0]
    with running(model) as (engine, recorder):
        engine.submit("a", prompt, scoring(max_tokens))
        recorder.end("a")
        engine.submit("b", prompt, greedy(MAX_TOKENS))
        recorder.end("b")
    assert [step.num_hit_tokens for step in recorder.steps if step.queue_s] == [0, 64]  # of 70, in blocks of 16
    assert recorder.tokens("b") == generate(model, prompt, MAX_TOKENS)


def test_a_sequence_that_is_sent_back_tells_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.engine.max_scored_tokens", lambda _: 1)
    model = make_model("llama")
    prompts = [make_prompt(n) for n in (16, 100)]
    with running(model, kv_memory_bytes=10 * BYTES_PER_BLOCK) as (engine, recorder):
        engine.submit("old", prompts[0], greedy(120))  # takes 9 of 10 blocks in the end
        engine.submit("young", prompts[1], scoring(3))
        recorder.end("young")
        recorder.end("old")
    assert sum(step.num_preempted for step in recorder.steps) > 0
    assert_right(model, prompts[1], told(recorder, "young"))
    assert recorder.tokens("young") == generate(model, prompts[1], 3)
    assert recorder.tokens("old") == generate(model, prompts[0], 120)


def test_nan_behind_any_token_of_a_prompt_fails_it_and_not_its_neighbour() -> None:
    model, prompt = build_model("faulty"), make_prompt(20)
    with running(model) as (engine, recorder):
        engine.submit("good", prompt, scoring())
        engine.submit("bad", [*prompt, NAN_TOKEN_ID, *prompt], scoring())
        assert recorder.reason("bad") is FinishReason.NONFINITE
        assert recorder.reason("good") is FinishReason.LENGTH
    assert told(recorder, "bad") == []
    assert_right(model, prompt, told(recorder, "good"))


def test_a_step_that_raises_is_scored_again_for_the_others() -> None:
    model, prompt = build_model("faulty"), make_prompt(20)
    with running(model) as (engine, recorder):
        engine.submit("good", prompt, scoring())
        engine.submit("bad", [*prompt, RAISE_TOKEN_ID], scoring())
        assert recorder.reason("bad") is FinishReason.ERROR
        assert recorder.reason("good") is FinishReason.LENGTH
    assert_right(model, prompt, told(recorder, "good"))


@pytest.mark.parametrize("family", ["llama", "gptj"], ids=["packed", "per-request"])
def test_a_prompt_that_is_computed_in_parts_for_lack_of_memory_is_scored_once(family: str) -> None:
    model = make_model(family) if family == "llama" else make_unpackable(family)

    def refuse(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].shape[1] > 9:
            raise MemoryError("no memory for more than 9 tokens")

    with running(model) as (engine, recorder):
        hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, scoring(1))
        for i in range(len(PROMPTS)):
            recorder.end(str(i))
        hook.remove()
    assert recorder.num_step_errors > 0
    for i, prompt in enumerate(PROMPTS):
        assert_right(model, prompt, told(recorder, str(i)))
        assert recorder.tokens(str(i)) == generate(model, prompt, 1)


def test_no_token_may_be_asked_for_without_scores() -> None:
    with running(make_model("llama")) as (engine, recorder):
        engine.submit("a", make_prompt(20), greedy(0))
        assert recorder.reason("a") is FinishReason.LENGTH
    assert recorder.tokens("a") == []
    assert told(recorder, "a") == []


@pytest.mark.parametrize("num_logprobs", [None, 2], ids=["unasked", "asked"])
def test_the_token_that_ends_a_sequence_is_told_beside_the_others(num_logprobs: int | None) -> None:
    model, prompt = make_model("llama"), make_prompt(20)
    first, second = generate(model, prompt, 2)
    params = SamplingParams(max_tokens=9, temperature=0, stop_token_ids=frozenset({second}), num_logprobs=num_logprobs)
    with running(model) as (engine, recorder):
        engine.submit("a", prompt, params)
        end = recorder.end("a")
    assert recorder.tokens("a") == [first]
    if num_logprobs is None:
        assert end.stop_token is None
    else:
        assert end.stop_token is not None
        assert end.stop_token[0] == second == end.stop_token[1].top[0][0]


def test_few_tokens_are_scored_in_one_step_whatever_the_vocabulary() -> None:
    assert max_scored_tokens(150_000) * 150_000 * 4 <= 64 * 2**20
    assert max_scored_tokens(150_000) > 100
    assert max_scored_tokens(2**40) == 16


def test_without_being_asked_for_there_are_none() -> None:
    with running(make_model("llama")) as (engine, recorder):
        engine.submit("a", make_prompt(20), greedy(3))
        recorder.end("a")
        assert told(recorder, "a") == []
        assert len(recorder.tokens("a")) == 3
