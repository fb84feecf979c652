"""Checkpoints of any size whose weights are zeros: files with holes, which take no disk and no time to write."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from service.loading.shards import SINGLE_NAME

_TAGS = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write_sparse_checkpoint(folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write config and weights of a model, tied tensors once.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tied = model.all_tied_weights_keys
    header: dict[str, object] = {}
    position = 0
    for name, tensor in model.state_dict().items():
        if name not in tied:
            end = position + tensor.numel() * dtype.itemsize
            header[name] = {"dtype": _TAGS[dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
            position = end
    text = json.dumps(header).encode()
    with (folder / SINGLE_NAME).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return folder
