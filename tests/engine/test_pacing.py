"""Pacing with made-up times: a step takes STEP_S, and TOKEN_S for each prompt token."""

from __future__ import annotations

import pytest

from service.engine.config import EngineConfig
from service.engine.pacing import StepPacer, StepSize
from service.engine.stats import EnginePath, StepStats
from tests.engine.support import greedy, make_prompt, running
from tests.models import build_model

STEP_S, TOKEN_S = 0.010, 0.001
BUDGET_S = 0.050


def stats(num_prompt_tokens: int, *, slowness: float = 1.0, num_decodes: int = 1) -> StepStats:
    kind = "mixed" if num_prompt_tokens and num_decodes else "prefill" if num_prompt_tokens else "decode"
    return StepStats(
        kind=kind,  # type: ignore[arg-type]
        seconds=slowness * (STEP_S + TOKEN_S * num_prompt_tokens),
        num_sequences=num_decodes + 1,
        num_tokens=num_prompt_tokens + num_decodes,
        num_prompt_tokens=num_prompt_tokens,
        inter_token_s=(),
        first_token_s=(),
        queue_s=(),
    )


def learned(budget_s: float = BUDGET_S) -> StepPacer:
    pacer = StepPacer(budget_s, least_tokens=4)
    for _ in range(40):
        pacer.observe(stats(0))
        pacer.observe(stats(50))
    return pacer


def most(pacer: StepPacer) -> int:
    tokens = pacer.most_prompt_tokens()
    assert tokens is not None
    return tokens


def test_before_the_first_prompt_there_is_no_limit() -> None:
    pacer = StepPacer(BUDGET_S, least_tokens=4)
    assert pacer.most_prompt_tokens() is None
    pacer.observe(stats(0))
    assert pacer.most_prompt_tokens() is None


def test_the_prompt_tokens_of_a_step_fill_the_budget() -> None:
    assert most(learned()) == pytest.approx(BUDGET_S / TOKEN_S, abs=1)


def test_a_budget_below_a_few_tokens_leaves_the_least() -> None:
    assert most(learned(budget_s=2 * TOKEN_S)) == 4


def test_one_slow_step_with_a_prompt_hardly_changes_the_limit() -> None:
    pacer = learned()
    before = most(pacer)
    pacer.observe(stats(50, slowness=1000))
    assert before / 1.25 <= most(pacer) < before


def test_one_slow_decode_hardly_changes_the_limit() -> None:
    pacer = learned()
    before = most(pacer)
    pacer.observe(stats(0, slowness=1000))
    for _ in range(20):
        pacer.observe(stats(50))  # whose prompt tokens seem to take less than they did
    assert before < most(pacer) <= 1.05 * before


def test_a_machine_that_becomes_slow_is_followed() -> None:
    pacer = learned()
    for _ in range(30):
        pacer.observe(stats(0, slowness=3))
        pacer.observe(stats(50, slowness=3))
    assert most(pacer) == pytest.approx(BUDGET_S / (3 * TOKEN_S), abs=1)


def test_a_slow_first_step_is_forgotten() -> None:
    pacer = StepPacer(BUDGET_S, least_tokens=4)
    pacer.observe(stats(20, slowness=100, num_decodes=0))
    assert most(pacer) == 4
    for _ in range(40):
        pacer.observe(stats(0))
        pacer.observe(stats(most(pacer)))
    assert most(pacer) == pytest.approx(BUDGET_S / TOKEN_S, rel=0.05)


def test_a_step_with_few_prompt_tokens_says_nothing_about_their_cost() -> None:
    pacer = learned()
    before = most(pacer)
    for _ in range(20):
        pacer.observe(stats(1, num_decodes=0, slowness=2))
    assert most(pacer) == before


def test_steps_of_no_time_set_no_limit() -> None:
    pacer = StepPacer(BUDGET_S, least_tokens=4)
    for _ in range(3):
        pacer.observe(stats(20, slowness=0))
        pacer.observe(stats(0, slowness=0))
    assert pacer.most_prompt_tokens() is None


# How long the longest step takes

SIZE = StepSize(num_prompt_tokens=512, num_rounds=1)


def test_before_the_first_step_the_longest_one_is_that_of_the_assumed_speed() -> None:
    pacer = StepPacer(BUDGET_S, least_tokens=4)
    pacer.assume(0.25)
    assert pacer.longest_s(SIZE) == 512 * 0.25
    pacer.observe(stats(50, num_decodes=0))
    assert pacer.longest_s(SIZE) == pytest.approx(512 * (TOKEN_S + STEP_S / 50))


@pytest.mark.parametrize("slowness", [1, 1000])
def test_the_longest_step_is_as_slow_as_the_model(slowness: float) -> None:
    pacer = StepPacer(BUDGET_S, least_tokens=4)
    for _ in range(40):
        pacer.observe(stats(0, slowness=slowness))
        pacer.observe(stats(50, slowness=slowness))
    assert pacer.longest_s(SIZE) == pytest.approx(slowness * (STEP_S + 512 * TOKEN_S), rel=0.01)
    assert pacer.longest_s(StepSize(0, 64)) == pytest.approx(slowness * 64 * STEP_S, rel=0.01)


@pytest.mark.parametrize(
    ("path", "deterministic", "chunked", "expected"),
    [
        (EnginePath.PACKED, False, True, StepSize(512 + 64, 1)),
        (EnginePath.PACKED, True, True, StepSize(512 + 64, 8)),
        (EnginePath.PER_REQUEST, False, True, StepSize(512 + 64, 8)),
        (EnginePath.PER_REQUEST, False, False, StepSize(512 + 4096, 8)),
    ],
    ids=["packed", "deterministic", "per-request", "whole-prompts"],
)
def test_the_longest_step_counts_forwards_and_whole_prompts(
    path: EnginePath, expected: StepSize, *, deterministic: bool, chunked: bool
) -> None:
    config = EngineConfig(
        max_model_len=4096, kv_memory_bytes=1, vocab_size=1, max_num_seqs=8, deterministic=deterministic
    )
    assert config.longest_step(path, chunked=chunked) == expected


def test_an_engine_tells_how_long_a_step_may_take_from_its_start_on() -> None:
    for least_s, most_s in ((1e-9, 1e6), (1e6, 1e6)):
        with running(build_model("llama"), least_step_limit_s=least_s) as (engine, recorder):
            assert least_s <= engine.state().step_limit_s <= most_s
            engine.submit("a", make_prompt(40), greedy(4))
            recorder.end("a")
            assert least_s <= engine.state().step_limit_s <= most_s
