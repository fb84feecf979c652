"""Small float32 models that cannot be packed: of their own attention, with a state, or of stretched positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from tests.models import VOCAB_SIZE, FaultyConfig, FaultyLlama, build_model

ROPE_LENGTH = 40
"""Positions from which on dynamic and longrope frequencies change."""

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_LLAMA: dict[str, Any] = _TOKENS | {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}
_GPT: dict[str, Any] = _TOKENS | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
_MAMBA: dict[str, Any] = _TOKENS | {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8}


def _falcon(**options: Any) -> PreTrainedModel:
    return FalconForCausalLM(FalconConfig(**_LLAMA | {"ffn_hidden_size": 96} | options))


def _longrope() -> PreTrainedModel:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ROPE_LENGTH} | factors
    sizes = _LLAMA | {"original_max_position_embeddings": ROPE_LENGTH, "rope_parameters": rope}
    return Phi3ForCausalLM(Phi3Config(**sizes))


def _dynamic() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaForCausalLM(LlamaConfig(**_LLAMA | {"max_position_embeddings": ROPE_LENGTH, "rope_parameters": rope}))


def _qwen3_next() -> PreTrainedModel:
    linear = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "head_dim": 16,
    }
    return Qwen3NextForCausalLM(Qwen3NextConfig(**_LLAMA | linear | experts))


def _recurrent_gemma() -> PreTrainedModel:
    options = {"lru_width": 64, "attention_window_size": 16, "head_dim": 16, "num_key_value_heads": 1}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**_LLAMA | options))


_MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_GPT, rotary_dim=8)),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**_GPT, rotary_dim=8)),
    "falcon-alibi": lambda: _falcon(alibi=True),
    "falcon-rope": lambda: _falcon(alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**_TOKENS, hidden_size=64, n_layer=3, n_head=4)),
    "mpt": lambda: MptForCausalLM(MptConfig(**_TOKENS, d_model=64, n_layers=3, n_heads=4, max_seq_len=512)),
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**_LLAMA)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**_MAMBA)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**_MAMBA, num_heads=8, head_dim=16, n_groups=1, chunk_size=8)),
    "qwen3_next": _qwen3_next,
    "llama-dynamic-rope": _dynamic,
    "phi3-longrope": _longrope,
    "openai-gpt": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**_GPT)),
    "recurrent_gemma": _recurrent_gemma,
}
FAMILIES = list(_MAKERS)


@torch.no_grad()
def make_unpackable(family: str) -> PreTrainedModel:
    """One of `FAMILIES` with random weights that spread enough for greedy output to vary."""
    torch.manual_seed(0)
    model = _MAKERS[family]()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "conv" not in name:
            parameter.normal_(std=0.6 if family == "openai-gpt" else 0.2)
    nn.Module.eval(model)
    return model


class UnpackableFaulty(FaultyLlama):  # type: ignore[no-untyped-call]
    """A `FaultyLlama` that says of itself that it takes no attention function."""

    _supports_attention_backend = False

    def forward(  # type: ignore[override] # the keywords by name, so that they are seen
        self,
        input_ids: Tensor,
        *,
        past_key_values: Any = None,
        position_ids: Any = None,
        attention_mask: Any = None,
        use_cache: Any = None,
        logits_to_keep: int = 0,
    ) -> Any:
        return super().forward(
            input_ids,
            past_key_values=past_key_values,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )


def make_unpackable_faulty() -> PreTrainedModel:
    """The family `faulty` of `tests.models`, computed per request."""
    packed = build_model("faulty")
    assert isinstance(packed.config, FaultyConfig)
    model = UnpackableFaulty(packed.config)
    model.load_state_dict(packed.state_dict())
    return model
