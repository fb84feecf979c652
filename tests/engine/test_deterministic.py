"""With `deterministic` a request gets the same bits whatever runs beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from service.demo import model_folder
from service.engine.batch import Work
from service.engine.config import EngineConfig
from service.engine.execution import fixed_pieces
from service.engine.sequence import FinishReason, SamplingParams, TokenLogprobs
from service.engine.stats import EnginePath
from service.loading.loader import load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from tests.engine.families import make_unpackable
from tests.engine.scheduling import make_scheduler, make_sequence, step
from tests.engine.support import Recorder, make_prompt, running
from tests.kernels.support import computing_with
from tests.models import NAN_TOKEN_ID, build_model

NUM_ALONE, NUM_IN_COMPANY = 24, 8
PROMPT = make_prompt(150, seed=99)
PARAMS = SamplingParams(max_tokens=NUM_ALONE, temperature=0.9, top_p=0.95, seed=5, num_logprobs=3)
BLOCK_BYTES = 16 * 3 * 2 * (2 * 16)
"""Of the llama families, for each byte of a number: tokens, layers, K and V, heads and their size."""

Told = list[tuple[int, TokenLogprobs]]


def neighbours(count: int = 7) -> list[tuple[list[int], SamplingParams]]:
    """Random prompts, some of which begin like the one that is looked at."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        length, max_tokens, shared = torch.randint(1, 40, (3,), generator=generator).tolist()
        prompt = [*(PROMPT[:shared] if number % 2 else []), *make_prompt(length, seed=number)]
        found.append((prompt, SamplingParams(max_tokens=max_tokens // 2 + 1, temperature=1.0, seed=number, top_k=20)))
    return found


def told(recorder: Recorder, request_id: str = "it") -> Told:
    """Token ids and raw log-probabilities, exact to the last bit."""
    recorder.end(request_id)
    events = recorder.events[request_id]
    return [pair for event in events for pair in zip(event.token_ids, event.logprobs, strict=True)]


def alone(model: PreTrainedModel, **limits: Any) -> Told:
    """With nobody else, and to its end."""
    with running(model, **limits) as (engine, recorder):
        engine.submit("it", PROMPT, PARAMS)
        return told(recorder)


def in_company(model: PreTrainedModel, place: int, **limits: Any) -> Told:
    """Beside seven others, of which `place` were there before."""
    others = neighbours()
    with running(model, **limits) as (engine, recorder):
        for number, (prompt, params) in enumerate(others):
            if number == place:
                engine.submit("it", PROMPT, replace(PARAMS, max_tokens=NUM_IN_COMPANY))
            engine.submit(str(number), prompt, params)
        for number in range(len(others)):
            recorder.end(str(number))
        return told(recorder)


def sent_back(model: PreTrainedModel, **limits: Any) -> Told:
    """Beside an older one that takes its blocks away after it has begun to decode."""
    num_blocks = 19
    element_size = next(model.parameters()).element_size()
    with running(model, **{"kv_memory_bytes": num_blocks * BLOCK_BYTES * element_size, **limits}) as (engine, recorder):
        engine.submit("old", make_prompt(110), SamplingParams(max_tokens=100, temperature=0))
        engine.submit("it", PROMPT, PARAMS)
        found = told(recorder)
        recorder.end("old")
    assert sum(step.num_preempted for step in recorder.steps) > 0
    return found


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_model("llama", dtype=request.param, max_position_embeddings=512)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> Told:
    found = alone(model, deterministic=True)
    assert len({token for token, _ in found}) > 5, "output that hardly varies proves little"
    return found


@pytest.mark.parametrize("max_num_batched_tokens", [512, 70])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_tokens_and_log_probabilities_are_the_same_bits_in_any_company(
    model: PreTrainedModel, expected: Told, max_num_batched_tokens: int, place: int
) -> None:
    found = in_company(model, place, deterministic=True, max_num_batched_tokens=max_num_batched_tokens)
    assert found == expected[:NUM_IN_COMPANY]


def test_a_sequence_that_is_sent_back_gets_the_same_bits(model: PreTrainedModel, expected: Told) -> None:
    assert sent_back(model, deterministic=True) == expected


def test_otherwise_company_changes_low_bits(model: PreTrainedModel) -> None:
    with computing_with("torch"):  # the native attention does not mind company
        assert in_company(model, 3) != alone(model)[:NUM_IN_COMPANY]


MORE_MODELS: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: build_model("gemma2", dtype="bfloat16"),
    "gpt_oss": lambda: build_model("gpt_oss", dtype="bfloat16"),
    "mixtral": lambda: build_model("mixtral", dtype="bfloat16"),
    "gptj": lambda: nn.Module.to(make_unpackable("gptj"), torch.bfloat16),
    "llama-dynamic-rope": lambda: make_unpackable("llama-dynamic-rope"),
}


@pytest.mark.parametrize("name", MORE_MODELS)
def test_windows_experts_and_caches_of_each_request_are_no_exception(name: str) -> None:
    model = MORE_MODELS[name]()
    assert in_company(model, 3, deterministic=True) == alone(model, deterministic=True)[:NUM_IN_COMPANY]


def test_the_demo_model_as_it_is_served_is_no_exception() -> None:
    options = LoadOptions(model=str(model_folder()), recipe=parse_recipe("w8a16"), dtype="bfloat16")
    model = load_model(options, LoadProgress()).model
    assert isinstance(model, PreTrainedModel)
    limits = {"kv_memory_bytes": 1 << 24, "deterministic": True}
    assert in_company(model, 3, **limits) == alone(model, **limits)[:NUM_IN_COMPANY]


def test_each_forward_holds_one_sequence_and_nothing_comes_from_the_cache(model: PreTrainedModel) -> None:
    with running(model, deterministic=True) as (engine, recorder):
        assert engine.path is EnginePath.PACKED
        for name in ("first", "second"):
            engine.submit(name, PROMPT, PARAMS)
            recorder.end(name)
        assert engine.state().num_cached_kv_blocks == 0
    assert sum(step.num_hit_tokens for step in recorder.steps) == 0
    assert recorder.tokens("first") == recorder.tokens("second")


@pytest.mark.parametrize("asks", [None, 1], ids=["plain", "scored"])
def test_a_prompt_that_goes_wrong_in_its_first_chunk_fails_whatever_follows(asks: int | None) -> None:
    prompt = [NAN_TOKEN_ID, *PROMPT]
    with running(build_model("faulty"), deterministic=True) as (engine, recorder):
        engine.submit("bad", prompt, replace(PARAMS, num_prompt_logprobs=asks))
        assert recorder.reason("bad") is FinishReason.NONFINITE
        assert recorder.tokens("bad") == []


# How prompts are cut


def pieces(num_prompt_tokens: int, num_generated: int, position: int, *, length: int) -> list[tuple[int, int]]:
    sequence = make_sequence("a", num_prompt_tokens)
    sequence.token_ids += [1] * num_generated
    work = Work(sequence, position, num_prompt_tokens + num_generated - position)
    return [(piece.position, piece.count) for piece in fixed_pieces(work, length)]


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_generated", "position", "expected"),
    [
        (10, 0, 0, [(0, 4), (4, 4), (8, 2)]),
        (10, 0, 4, [(4, 4), (8, 2)]),
        (8, 0, 0, [(0, 4), (4, 4)]),
        (6, 3, 0, [(0, 4), (4, 2), (6, 1), (7, 1), (8, 1)]),
        (6, 1, 6, [(6, 1)]),
    ],
    ids=["prompt", "its-end", "whole-chunks", "sent-back", "decode"],
)
def test_prompts_are_computed_in_chunks_and_what_was_generated_one_by_one(
    num_prompt_tokens: int, num_generated: int, position: int, expected: Sequence[tuple[int, int]]
) -> None:
    assert pieces(num_prompt_tokens, num_generated, position, length=4) == expected


def test_a_step_ends_where_a_chunk_ends_and_the_first_in_line_gets_one_in_any_case() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=7, chunk_length=4)
    scheduler.add(make_sequence("a", 2, 9))
    scheduler.add(make_sequence("b", 14, 2))
    scheduler.add(make_sequence("c", 3, 2))
    assert step(scheduler) == [("a", 0, 2), ("b", 0, 4), ("c", 0, 3)], "of 5 tokens b takes 4, and c more than is left"
    assert step(scheduler) == [("a", 2, 1), ("c", 3, 1), ("b", 4, 4)]
    assert step(scheduler) == [("a", 3, 1), ("b", 8, 6)], "a chunk and what is left of the prompt"


def test_a_chunk_is_no_longer_than_a_step() -> None:
    config = EngineConfig(
        max_model_len=99, kv_memory_bytes=1, vocab_size=1, max_num_batched_tokens=8, deterministic=True
    )
    assert config.chunk_length(chunked=True) == 8
    assert config.chunk_length(chunked=False) == 99, "a prompt that must be computed at once is one chunk"
