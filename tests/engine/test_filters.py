from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
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
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from service.engine.filters import (
    check_supported,
    first_position,
    length_dependent_rope,
    max_positions,
    packing_obstacle,
)
from service.errors import UnsupportedModel
from tests.engine.support import make_model

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


def mamba_with_attention_backend() -> PreTrainedModel:
    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    model._supports_attention_backend = True
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "encoder": (lambda: BertLMHeadModel(BertConfig(**SMALL)), r"'bert'.*attends in both directions"),
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=32, vocab_size=64)),
        r"'t5'.*has an encoder",
    ),
    "no-transformers-model": (lambda: nn.Linear(2, 2), r"'Linear'.*no model of transformers"),
}
OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own-attention": (
        lambda: GPTJForCausalLM(GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=8, vocab_size=64)),
        "it has no exchangeable attention function",
    ),
    "state": (mamba_with_attention_backend, "it keeps a recurrent state"),
    "dynamic-rope": (
        lambda: llama_with("dynamic"),
        "its rotary embedding (dynamic) depends on the longest sequence of a batch",
    ),
    "chunked-layers": (llama_with_chunked_layers, "it has layers of type chunked_attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_continues_no_text_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=message):
        check_supported(make())


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_model_that_no_row_can_hold_is_served_but_not_packed(name: str) -> None:
    make, obstacle = OBSTACLES[name]
    model = make()
    check_supported(model)
    assert packing_obstacle(model) == obstacle


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral", "gemma2", "gpt-oss"])
def test_a_decoder_can_be_packed(family: str) -> None:
    model = make_model(family)
    check_supported(model)
    assert packing_obstacle(model) is None


def test_a_rope_type_that_ignores_the_length_is_no_obstacle() -> None:
    model = llama_with("linear")
    assert length_dependent_rope(model) == []
    assert packing_obstacle(model) is None


@pytest.mark.parametrize("pad_token_id", [0, 1, 5])
def test_positions_of_roberta_begin_behind_its_padding_id(pad_token_id: int) -> None:
    config = RobertaConfig(**SMALL, is_decoder=True, pad_token_id=pad_token_id)
    assert first_position(RobertaForCausalLM(config)) == pad_token_id + 1


def test_positions_of_others_begin_at_0() -> None:
    assert first_position(make_model("llama")) == 0


def test_a_limit_of_positions_that_is_none_is_taken_as_none() -> None:
    model = XLNetLMHeadModel(XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32, vocab_size=64))
    assert model.config.max_position_embeddings == -1
    assert max_positions(model) is None
    assert max_positions(LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=77))) == 77
