"""Tiny real model families for tests, with random weights and a byte-level tokenizer.

Every size is small and some are no powers of two. The weights spread enough for greedy output to vary.
The family `faulty` is a Llama that misbehaves when it meets one of four token ids; see `FaultyLlama`.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

FAMILIES = ["llama", "llama_tied", "qwen2", "gpt2"]
"""The families without faults that most tests are about."""

_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, **_ALTERNATING},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, **_ALTERNATING}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 48}),
    "gpt_neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {"num_local_experts": 8}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "mlp_only_layers": [0]},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 40,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 40,
            "first_k_dense_replace": 1,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1, "logits_scaling": 4.0},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **_ALTERNATING,
        },
    ),
    "falcon": ("falcon", {"new_decoder_architecture": True}),
    "bloom": ("bloom", {}),
}
"""Family to its model type in transformers and what its config has besides the common sizes; 2 layers each."""

VOCAB_SIZE = 300
CONTEXT = 256
END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
MERGES = (
    "Ġ t|h e|Ġ a|i n|Ġt he|e r|o n|r e|Ġ s|Ġ w|n d|a t|Ġ o|e n|i s|Ġ c|o u|Ġ b|i t|Ġ f|Ġa nd|Ġ p|in g|e d|Ġ h|"
    "Ġo f|a l|o r|Ġ m|e s|Ġt o|a r|Ġ in|Ġ d|l e|i c|s t|Ġ l|e l|o t|Ġ n|v e|Ġb e"
)

RAISE_TOKEN_ID = 2
"""`FaultyLlama` raises RuntimeError when a step holds it. The text `"\\x01"`."""
NAN_TOKEN_ID = 3
"""`FaultyLlama` computes NaN in the sequence that holds it. The text `"\\x02"`."""
BLOCK_TOKEN_ID = 4
"""`FaultyLlama` waits at its gate when a step holds it. The text `"\\x03"`."""
OOM_TOKEN_ID = 5
"""`FaultyLlama` has no memory for a step that holds it, however few its tokens. The text `"\\x04"`."""
FAULT_TOKEN_IDS = [RAISE_TOKEN_ID, NAN_TOKEN_ID, BLOCK_TOKEN_ID, OOM_TOKEN_ID]

GATE_TIMEOUT_S = 60.0


class FaultyConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """A Llama config with a model type of its own."""

    model_type = "faulty_llama"


class FaultyLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A Llama that raises, computes NaN, blocks or runs out of memory when it meets the token ids above.

    It never gives them itself, unless a request's `logit_bias` makes it.

    Attributes:
        most_tokens: of one forward that its memory suffices for; None for any number.
        reached: set when a step arrives at the gate.
        opened: lets the step pass; the fixture `gate` clears both before a test and opens it afterwards.
    """

    config_class = FaultyConfig
    most_tokens: int | None = None
    reached = threading.Event()
    opened = threading.Event()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Compute what Llama computes, unless a token id asks for a fault."""
        is_too_long = self.most_tokens is not None and input_ids.numel() > self.most_tokens
        if is_too_long or (input_ids == OOM_TOKEN_ID).any():
            raise torch.OutOfMemoryError(f"no memory for {input_ids.numel()} tokens")
        if (input_ids == RAISE_TOKEN_ID).any():
            raise RuntimeError(f"token {RAISE_TOKEN_ID} was met")
        if (input_ids == BLOCK_TOKEN_ID).any():
            self.reached.set()
            if not self.opened.wait(GATE_TIMEOUT_S):
                raise RuntimeError(f"the gate stayed closed for {GATE_TIMEOUT_S} s")
        embeddings = self.get_input_embeddings()(input_ids)
        embeddings = embeddings.masked_fill((input_ids == NAN_TOKEN_ID)[..., None], torch.nan)
        output = super().forward(inputs_embeds=embeddings, **kwargs)
        output.logits[..., FAULT_TOKEN_IDS] -= 50
        return output


AutoConfig.register(FaultyConfig.model_type, FaultyConfig)
AutoModelForCausalLM.register(FaultyConfig, FaultyLlama)


def build_model(
    family: str,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Build a model in memory, in evaluation mode; equal arguments give equal weights.

    Args:
        family: one of `FAMILIES` or `MORE_FAMILIES`, or `faulty`.
        config_overrides: by the names of the family's config class.
    """
    model_class, config = _config(family, config_overrides)
    config.architectures = [model_class.__name__]
    model: PreTrainedModel = model_class(config)
    _randomize(model, torch.Generator().manual_seed(seed))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)  # type: ignore[no-untyped-call]
    model.to(getattr(torch, dtype))
    return model.eval()  # type: ignore[no-untyped-call,no-any-return]


def write_checkpoint(
    family: str,
    folder: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    num_shards: int = 1,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Write a model directory as `save_pretrained` does, in exactly `num_shards` safetensors files.

    Returns:
        `folder`.
    """
    build_model(family, dtype=dtype, seed=seed, **config_overrides).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    if num_shards > 1:
        _split(folder, num_shards)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens: 0 is the end of text, `b + 1` is byte b, merges follow."""
    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in MERGES.split("|"))]
    names = [END_OF_TEXT, *_byte_names(), *(left + right for left, right in merges)]
    core = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    assert core.get_vocab_size() == VOCAB_SIZE
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(family: str, overrides: dict[str, Any]) -> tuple[type[PreTrainedModel], Any]:
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    llama = tokens | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    gpt2 = tokens | {"n_embd": 64, "n_inner": 100, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
    match family:
        case "llama":
            return LlamaForCausalLM, LlamaConfig(**llama | overrides)
        case "llama_tied":
            return LlamaForCausalLM, LlamaConfig(**llama | {"tie_word_embeddings": True} | overrides)
        case "qwen2":
            return Qwen2ForCausalLM, Qwen2Config(**llama | overrides)
        case "gpt2":
            return GPT2LMHeadModel, GPT2Config(**gpt2 | overrides)
        case "faulty":
            return FaultyLlama, FaultyConfig(**llama | overrides)
    if family in MORE_FAMILIES:
        model_type, extras = MORE_FAMILIES[family]
        config = AutoConfig.for_model(model_type, **llama | {"num_hidden_layers": 2} | extras | overrides)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return model_class, config
    raise ValueError(f"family {family!r} is not one of {[*FAMILIES, *MORE_FAMILIES, 'faulty']}")


@torch.no_grad()
def _randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Give every parameter values of its own: biases and norms too, so that a lost one shows.

    Layers outweigh the embedding; else a tied head repeats the token that it was given.
    """
    embed_scale = float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))
    for name, parameter in model.named_parameters():
        parameter.normal_(0, _spread(name, parameter), generator=generator)
        if name == "model.embed_tokens.weight":
            parameter.div_(embed_scale)
        if "norm" in name or "ln_" in name:
            parameter.add_(0 if name.endswith("bias") else 1)
    if isinstance(model, FaultyLlama):
        model.lm_head.weight[FAULT_TOKEN_IDS] = 0  # it never chooses a fault greedily


def _spread(name: str, parameter: Tensor) -> float:
    if parameter.ndim == 1:
        return 0.1
    return 0.1 if any(part in name for part in ("embed", "wte", "wpe")) else 0.25


def _split(folder: Path, num_shards: int) -> None:
    """Replace `model.safetensors` by shards of neighbouring tensors and their index."""
    single = folder / "model.safetensors"
    tensors = load_file(single)
    names = list(tensors)
    assert num_shards <= len(names)
    weight_map: dict[str, str] = {}
    for i in range(num_shards):
        file_name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        part = names[i * len(names) // num_shards : (i + 1) * len(names) // num_shards]
        save_file({name: tensors[name] for name in part}, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    single.unlink()


def _byte_names() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
