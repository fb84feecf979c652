"""The engine against transformers' own `generate`."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from service.engine.stats import EnginePath
from tests.engine.support import BYTES_PER_BLOCK, generate, greedy, make_model, make_prompt, running
from tests.kernels.support import computing_with

FAMILIES = ["llama", "llama_tied", "qwen2", "gpt2", "mistral", "gemma2", "gpt-oss"]
PROMPTS = [make_prompt(n) for n in (5, 17, 33, 1, 50)]
MAX_TOKENS = 20

Case = tuple[PreTrainedModel, list[list[int]]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    model = make_model(request.param)
    expected = [generate(model, prompt, MAX_TOKENS) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 10, "outputs that hardly vary prove little"
    return model, expected


def test_a_sequence_alone_gets_the_tokens_of_generate(case: Case) -> None:
    model, expected = case
    with running(model) as (engine, recorder):
        assert engine.path is engine.state().path is EnginePath.PACKED
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
            recorder.end(str(i))
            assert recorder.tokens(str(i)) == expected[i]


@pytest.mark.parametrize(
    ("max_num_batched_tokens", "isa"),
    [(7, "auto"), (512, "auto"), (7, "torch"), (512, "torch")],
    ids=["chunks", "whole-prompts", "torch-chunks", "torch-whole-prompts"],
)
def test_staggered_sequences_get_the_tokens_of_generate(case: Case, max_num_batched_tokens: int, isa: str) -> None:
    model, expected = case
    with computing_with(isa), running(model, max_num_batched_tokens=max_num_batched_tokens) as (engine, recorder):
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
            if i % 2 == 0:
                recorder.wait_for_tokens(str(i))  # the next one meets neighbours that decode
        for i in range(len(PROMPTS)):
            recorder.end(str(i))
            assert recorder.tokens(str(i)) == expected[i]
    assert all(step.num_tokens <= max_num_batched_tokens for step in recorder.steps)
    assert {"prefill", "decode", "mixed"} == {step.kind for step in recorder.steps}


@pytest.mark.parametrize("isa", ["auto", "torch"])
def test_sequences_whose_blocks_are_scattered_get_the_tokens_of_generate(case: Case, isa: str) -> None:
    model, expected = case
    # Room for 12 blocks: short sequences end and leave holes, which the long last one has to fill.
    bytes_per_block = BYTES_PER_BLOCK * (2 if model.config.model_type == "gpt2" else 1)  # 4 KV heads
    with computing_with(isa), running(model, kv_memory_bytes=12 * bytes_per_block) as (engine, recorder):
        assert engine.state().num_kv_blocks == 12
        for i, max_tokens in enumerate((5, 100, 5)):
            engine.submit(f"hole{i}", PROMPTS[0], greedy(max_tokens))
        engine.submit("0", PROMPTS[4], greedy(MAX_TOKENS))
        recorder.end("0")
        assert recorder.tokens("0") == expected[4]
        assert recorder.tokens("hole1")[:MAX_TOKENS] == expected[0]
