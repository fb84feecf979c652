"""Steps that do not fit the memory are computed in parts, and only what cannot be computed at all fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from service.engine.execution import is_out_of_memory
from service.engine.sequence import FinishReason, SamplingParams
from service.engine.stats import EnginePath
from tests.engine.families import make_unpackable, make_unpackable_faulty
from tests.engine.support import BYTES_PER_BLOCK, generate, greedy, make_prompt, running, solo
from tests.models import OOM_TOKEN_ID, build_model

PROMPTS = [make_prompt(n) for n in (40, 3, 25, 1, 18)]
MAX_TOKENS = 6


@pytest.fixture(params=[EnginePath.PACKED, EnginePath.PER_REQUEST])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_model("faulty") if request.param is EnginePath.PACKED else make_unpackable_faulty()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "service.engine.execution"]


def real_error() -> Exception:
    """What torch raises when it has no memory on a CPU."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (real_error(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("token 2 was met"), False),
        (ValueError("out of memory"), False),
    ],
    ids=["torch-cpu", "torch-cuda", "python", "cublas", "driver", "other", "other-class"],
)
def test_what_counts_as_out_of_memory(error: Exception, *, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("most_tokens", [1, 7])
def test_steps_that_do_not_fit_are_computed_in_parts_with_the_same_tokens(
    model: Any, most_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    with running(model) as (engine, recorder):
        model.most_tokens = most_tokens
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
        for i in range(len(PROMPTS)):
            assert recorder.reason(str(i)) is FinishReason.LENGTH
    for i, prompt in enumerate(PROMPTS):
        assert recorder.tokens(str(i)) == generate(build_model("faulty"), prompt, MAX_TOKENS)
    assert recorder.num_step_errors > 0
    assert len(warnings(caplog)) == recorder.num_step_errors, "one line for each step that did not fit"
    assert "ran out of memory (OutOfMemoryError: no memory for" in warnings(caplog)[0]


def test_a_step_that_fits_is_not_split(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with running(model) as (engine, recorder):
        model.most_tokens = 100
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
        for i in range(len(PROMPTS)):
            recorder.end(str(i))
    assert recorder.num_step_errors == 0
    assert warnings(caplog) == []


def test_what_fits_in_no_part_ends_only_its_own_sequence(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    neighbours = {f"neighbour{n}": make_prompt(n) for n in (3, 18, 30)}
    bad = [*make_prompt(20), OOM_TOKEN_ID, *make_prompt(5)]
    with running(model, max_num_batched_tokens=32) as (engine, recorder):
        for name, prompt in neighbours.items():
            engine.submit(name, prompt, greedy(20))
        recorder.wait_for_tokens("neighbour3")
        engine.submit("bad", bad, greedy(20))
        end = recorder.end("bad")
        assert end.finish_reason is FinishReason.ERROR
        assert end.error == (
            "out of memory: there is none to compute 1 token of this sequence, which cannot be computed in smaller "
            "parts; shorten it"
        )
        for name, prompt in neighbours.items():
            assert recorder.reason(name) is FinishReason.LENGTH
            assert recorder.tokens(name) == solo(model, prompt, greedy(20))
    assert recorder.num_step_errors == 1
    assert len(warnings(caplog)) == 2, "the step, and the sequence"


def test_a_prompt_that_must_be_computed_at_once_is_not_split(caplog: pytest.LogCaptureFixture) -> None:
    model = make_unpackable("llama-dynamic-rope")

    def refuse(_module: object, _args: object, arguments: dict[str, Any]) -> None:
        if arguments["input_ids"].numel() > 16:
            raise torch.OutOfMemoryError("no memory")

    with running(model) as (engine, recorder):
        hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
        engine.submit("long", make_prompt(20), greedy(4))
        engine.submit("short", make_prompt(16), greedy(4))
        assert "none to compute 20 tokens of this sequence" in (recorder.end("long").error or "")
        assert recorder.reason("short") is FinishReason.LENGTH
        hook.remove()


def test_seeds_and_log_probabilities_of_prompts_are_those_of_whole_steps(model: Any) -> None:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.2, top_p=0.9, seed=7, num_prompt_logprobs=1)
    told = []
    for most_tokens in (None, 7):
        with running(model, prefix_cache=False) as (engine, recorder):
            model.most_tokens = most_tokens
            for i, prompt in enumerate(PROMPTS):
                engine.submit(str(i), prompt, params)
            for i in range(len(PROMPTS)):
                recorder.end(str(i))
        model.most_tokens = None
        told.append(recorder)
    whole, parts = told
    assert (whole.num_step_errors, parts.num_step_errors > 0) == (0, True)
    for i, prompt in enumerate(PROMPTS):
        assert parts.tokens(str(i)) == whole.tokens(str(i))
        found, expected = (
            [one.logprob for event in recorder.events[str(i)] for one in event.prompt_logprobs] for recorder in told
        )
        assert len(found) == len(prompt) - 1
        assert found == pytest.approx(expected, abs=1e-4)  # float32 sums in another order; logits are below 20


def test_steps_after_one_that_did_not_fit_begin_with_parts_of_what_did(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = build_model("faulty")
    forwards = []

    def count(_module: object, _args: object, arguments: dict[str, Any]) -> None:
        forwards.append(arguments["input_ids"].numel())

    with running(model, max_num_seqs=1, max_num_batched_tokens=64) as (engine, recorder):
        model.most_tokens = 20
        hook = model.register_forward_pre_hook(count, with_kwargs=True)
        engine.submit("a", make_prompt(200), greedy(100))
        recorder.end("a")
        model.most_tokens = None
        engine.submit("b", make_prompt(64), greedy(1))
        recorder.end("b")
        hook.remove()
    assert forwards[:7] == [64, 32, 16, 16, 16, 16, 16]
    assert max(forwards[3:20]) == 16
    assert forwards[-2] > 32, "a hundred steps later more is tried"
    assert recorder.num_step_errors == len(warnings(caplog)) == 1


def test_a_sequence_whose_blocks_are_computed_twice_leaves_its_neighbours_theirs(model: Any) -> None:
    with running(model, kv_memory_bytes=12 * BYTES_PER_BLOCK, prefix_cache=False) as (engine, recorder):
        engine.submit("early", make_prompt(30), greedy(15))
        recorder.wait_for_tokens("early", 5)
        model.most_tokens = 2
        for i, prompt in enumerate(PROMPTS[:3]):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
        for name in ("early", "0", "1", "2"):
            assert recorder.reason(name) is FinishReason.LENGTH
    model.most_tokens = None
    assert recorder.tokens("early") == solo(model, make_prompt(30), greedy(15))
