"""Checkpoints that take more than text: their text part is served, or they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from service.errors import CheckpointError, UnsupportedModel
from service.loading.shards import SINGLE_NAME
from tests.loading.support import load, logits
from tests.models import build_model

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def text_config(family: str) -> dict[str, Any]:
    config: dict[str, Any] = build_model(family).config.to_dict()
    return config


def write_multimodal(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel
    match kind:
        case "gemma3":
            config = Gemma3Config(
                text_config=text_config("gemma3"),
                vision_config={"model_type": "siglip_vision_model", **VISION},
                mm_tokens_per_image=4,
                image_token_index=298,
            )
            model = Gemma3ForConditionalGeneration(config)
        case "llava":
            llava = LlavaConfig(
                text_config=text_config("llama"),
                vision_config={"model_type": "clip_vision_model", **VISION},
                image_token_index=298,
            )
            model = LlavaForConditionalGeneration(llava)
        case _:
            raise ValueError(kind)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_the_text_part_answers_like_the_whole_model(kind: str, tmp_path: Path) -> None:
    folder = write_multimodal(kind, tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    loaded = load(folder)
    assert torch.allclose(logits(loaded.model), logits(whole), rtol=1e-5, atol=1e-6)
    names = set(dict(loaded.model.named_parameters()))
    assert not any("vision" in name or "projector" in name for name in names)
    quantized = load(folder, "w8a16")
    assert quantized.report.original_bytes == loaded.report.weight_bytes.total
    assert 0 < (logits(quantized.model) - logits(whole)).norm() < 0.1 * logits(whole).norm()


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model.text_model."])
def test_weights_of_the_text_part_are_found_under_each_of_their_names(prefix: str, tmp_path: Path) -> None:
    folder = write_multimodal("llava", tmp_path)
    expected = logits(load(folder).model)
    tensors = load_file(folder / SINGLE_NAME)
    own = {name for name in tensors if "language_model" in name}
    assert own
    renamed = {
        prefix + name.partition("language_model.model.")[2]: tensors[name] for name in own if "lm_head" not in name
    }
    head = next(tensor for name, tensor in tensors.items() if name.endswith("lm_head.weight"))
    head_name = "language_model.lm_head.weight" if prefix.startswith("language_model.") else "lm_head.weight"
    save_file(renamed | {head_name: head, "vision_tower.x": torch.ones(1)}, folder / SINGLE_NAME)
    assert torch.equal(logits(load(folder).model), expected)


def test_a_text_part_that_cannot_be_found_is_refused(tmp_path: Path) -> None:
    folder = write_multimodal("llava", tmp_path)
    tensors = load_file(folder / SINGLE_NAME)
    text = [name for name in tensors if "language_model." in name]
    others = {f"decoder.{i}": tensor for i, tensor in enumerate(tensors.values())}
    save_file(others, folder / SINGLE_NAME)
    with pytest.raises(
        UnsupportedModel, match=r"takes more than text, .*no weight begins with model\.language_model\."
    ):
        load(folder)
    del tensors[text[0]]
    save_file(tensors, folder / SINGLE_NAME)
    with pytest.raises(CheckpointError, match="the checkpoint lacks "):
        load(folder)


def test_a_text_part_that_is_no_model_by_itself_is_refused(tmp_path: Path) -> None:
    config = Qwen2VLConfig(text_config={"vocab_size": 300, "hidden_size": 32})
    config.architectures = [Qwen2VLForConditionalGeneration.__name__]
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModel, match="is a Qwen2VLForConditionalGeneration whose text part is of type qwen2_vl_text, which"
    ):
        load(tmp_path)
