from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from service.engine.runner import Runner, check_supported
from service.errors import UnsupportedModel
from tests.engine.support import greedy, make_model, make_prompt, running, solo

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}


def llama_with(rope_type: str) -> PreTrainedModel:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    return LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=rope))


def llama_with_chunked_layers() -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.config.layer_types = ["chunked_attention"]
    return model


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "encoder": (lambda: BertLMHeadModel(BertConfig(**SMALL)), r"'bert'.*attends in both directions"),
    "own-attention": (
        lambda: GPTJForCausalLM(GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=8, vocab_size=64)),
        r"'gptj'.*no exchangeable attention function",
    ),
    "state": (
        lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)),
        r"'mamba' cannot be served",
    ),
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=32, vocab_size=64)),
        r"'t5' cannot be served",
    ),
    "dynamic-rope": (lambda: llama_with("dynamic"), r"'llama'.*rotary embedding \(dynamic\) depends on the longest"),
    "chunked-layers": (llama_with_chunked_layers, r"'llama'.*layers of type chunked_attention"),
    "no-transformers-model": (lambda: nn.Linear(2, 2), r"'Linear'.*no exchangeable attention function"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_model_that_would_be_computed_wrongly_is_refused(name: str) -> None:
    make, message = UNSUPPORTED[name]
    with pytest.raises(UnsupportedModel, match=message):
        check_supported(make())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral", "gemma2", "gpt-oss"])
def test_a_decoder_is_accepted(family: str) -> None:
    check_supported(make_model(family))


def test_a_rope_type_that_ignores_the_batch_is_accepted() -> None:
    check_supported(llama_with("linear"))


def test_a_layer_that_attends_twice_is_refused() -> None:
    model = make_model("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 2)
    model.config.num_hidden_layers = 2
    with pytest.raises(UnsupportedModel, match="layer 0 attends twice in one forward"):
        Runner(model, 1 << 20)


class AllRowsLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Returns the logits of every token, as models do that do not know `logits_to_keep`."""

    def forward(self, input_ids: torch.Tensor, *, logits_to_keep: object, **kwargs: object) -> CausalLMOutputWithPast:
        assert logits_to_keep is not None
        output: CausalLMOutputWithPast = super().forward(input_ids, **kwargs)
        return output


def test_a_model_that_returns_all_rows_gives_the_same_tokens() -> None:
    model = make_model("llama")
    assert isinstance(model.config, LlamaConfig)
    all_rows = AllRowsLlama(model.config)
    all_rows.load_state_dict(model.state_dict())
    prompts = [make_prompt(n) for n in (4, 21)]
    with running(all_rows, max_num_batched_tokens=7) as (engine, recorder):
        for i, prompt in enumerate(prompts):
            engine.submit(str(i), prompt, greedy(9))
        for i in range(2):
            recorder.end(str(i))
    assert [recorder.tokens(str(i)) for i in range(2)] == [solo(model, prompt, greedy(9)) for prompt in prompts]


def test_decodes_of_very_different_length_give_the_same_tokens() -> None:
    model = make_model("mistral")
    prompts = [make_prompt(n) for n in (3, 450, 30, 6, 400)]  # more than 16 blocks apart: two batches in a step
    with running(model) as (engine, recorder):
        for i, prompt in enumerate(prompts):
            engine.submit(str(i), prompt, greedy(40))
        for i in range(len(prompts)):
            recorder.end(str(i))
    for i, prompt in enumerate(prompts):
        assert recorder.tokens(str(i)) == solo(model, prompt, greedy(40))
