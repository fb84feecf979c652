"""A tiny model of every causal language model type of transformers, with random weights.

Sizes go by the names of config fields, which most types share; `_SPECIAL` has what a type needs besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

VOCAB_SIZE = 300
CONTEXT = 256
NUM_LAYERS = 3

_NAMES: dict[int, str] = {
    VOCAB_SIZE: "vocab_size decoder_vocab_size vocab_size_per_layer_input",
    CONTEXT: "max_position_embeddings n_positions n_ctx max_seq_len seq_length context_length max_target_positions "
    "model_max_length",
    64: "hidden_size d_model n_embd emb_dim embedding_size attention_hidden_size lru_width word_embed_proj_dim "
    "input_embedding_size output_embedding_size embedding_dim hidden_size_global vision_output_dim projector_input_dim "
    "projector_output_dim out_hidden_size adapter_in_dim adapter_out_dim encoder_hash_byte_group_vocab "
    "adapter_input_size",
    96: "intermediate_size ffn_dim decoder_ffn_dim n_inner ffn_hidden_size d_inner dim_ff dff shared_intermediate_size "
    "feed_forward_size intermediate_size_mlp dense_intermediate_size encoder_ffn_dim",
    48: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size",
    NUM_LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks "
    "encoder_layers num_encoder_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_decoder_attention_heads "
    "linear_num_value_heads swa_num_attention_heads linear_num_heads encoder_attention_heads "
    "num_encoder_attention_heads attention_heads",
    2: "num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok moe_topk num_experts_per_token "
    "swa_num_key_value_heads moe_k num_query_groups n_group num_expert_group",
    1: "topk_group n_shared_experts first_k_dense_replace num_shared_experts moe_num_shared_experts num_dense_layers",
    16: "head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim swa_head_dim "
    "attention_head_dim kv_channels d_head query_pre_attn_scalar dim_head qk_nope_head_dim attention_head_size "
    "index_n_heads",
    8: "num_experts n_routed_experts num_local_experts moe_num_experts sliding_window sliding_window_size window_size "
    "attention_window_size rotary_dim qk_rope_head_dim state_size ssm_state_size mamba_d_state chunk_size "
    "mamba_chunk_size index_topk",
    12: "v_head_dim",
    24: "kv_lora_rank",
    40: "q_lora_rank",
    0: "bos_token_id eos_token_id pad_token_id",
}
SIZES = {name: value for value, names in _NAMES.items() for name in names.split()}

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128}
_HYBRID_LAYERS = ["linear_attention", "full_attention", "linear_attention"]

_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "head_dim": 24,
        "per_layer_config": {},
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 96,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
    },
    "gemma4_unified_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
    },
    "longcat_flash": {"zero_expert_num": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 20, "<|extra_200|>": 21}},
    "emu3_vqgan": {"base_channels": 32, "codebook_size": 64, "num_res_blocks": 1},
    "falcon_h1": _MAMBA,
    "granitemoehybrid": _MAMBA | {"layer_types": _HYBRID_LAYERS},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "moshi": {"sliding_window": CONTEXT},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh", "local"],
    },
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "shape_vocab_size": 20,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16, "ffn_round_up_to_multiple_of": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
        "mamba_d_state": 4,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "kv_channels": 16,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


_SPREAD = 0.25
_GENTLE_SPREAD = 0.1
_GENTLE = {"hrm_text"}
"""Types that repeat their layers so often that larger weights would make rounding errors grow beyond all bounds."""

_SEEDS = {"bert-generation": 1, "granite_swa": 1}
"""With 0 outputs hardly vary, or two tokens are so close that rounding decides."""

GENERATE_DEPARTS = {
    **dict.fromkeys(
        ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        "it numbers positions from 0, the model's own forward from behind the padding id",
    ),
    "xlm": "it appends a mask token",
    "recurrent_gemma": "what the prompt before has left in the model is used",
}
"""Types for which transformers' `generate` departs from the model's own forward over all tokens, and how."""


def tiny_fields(model_type: str) -> dict[str, Any]:
    """What the config of a type gets, besides its own defaults."""
    return _shrunk(CONFIG_MAPPING[model_type]().to_dict()) | _SPECIAL.get(model_type, {})


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    depth = max(
        (fields[name] for name in SIZES if SIZES[name] == NUM_LAYERS and isinstance(fields.get(name), int)), default=0
    )
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in SIZES and (value is not None or SIZES[name] == 0):
            found[name] = SIZES[name]
        elif isinstance(value, list) and depth and len(value) == depth:
            kinds = list(dict.fromkeys(value))
            found[name] = (kinds * NUM_LAYERS)[: max(NUM_LAYERS, len(kinds))]
        elif isinstance(value, dict) and value.get("model_type"):
            found[name] = {"model_type": value["model_type"]} | _shrunk(value) | _SPECIAL.get(value["model_type"], {})
    if "qk_rope_head_dim" in fields:  # multi-head latent attention
        found |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
    if "is_decoder" in fields:
        found["is_decoder"] = True
    return found


def build(model_type: str) -> PreTrainedModel:
    """A float32 model in evaluation mode; always the same."""
    config = CONFIG_MAPPING[model_type](**tiny_fields(model_type))
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if config.get_text_config() is not config:  # checkpoints hold all parts
        found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), found)
    model_class = found[0] if isinstance(found, tuple) else found
    torch.manual_seed(_SEEDS.get(model_type, 0))
    model: PreTrainedModel = model_class(config)
    model.config.architectures = [model_class.__name__]
    _randomize(model, _GENTLE_SPREAD if model_type in _GENTLE else _SPREAD)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)  # type: ignore[no-untyped-call]
    nn.Module.float(model)
    nn.Module.eval(model)
    return model


@torch.no_grad()
def _randomize(model: PreTrainedModel, spread: float) -> None:
    """Spread what is multiplied, and shift biases and norms. Embeddings weigh little, else a tied head repeats them."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        is_linear = isinstance(module, (nn.Linear, Conv1D))
        for leaf, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                parameter.normal_(std=0.02 / float(getattr(module, "scalar_embed_scale", 1.0)))
            elif parameter is weight if is_linear else parameter.ndim == 3 and not isinstance(module, nn.Conv1d):
                parameter.normal_(std=spread)
            elif parameter.ndim == 1 and (leaf == "bias" or "Norm" in type(module).__name__):
                parameter.add_(torch.randn_like(parameter) * 0.1)
