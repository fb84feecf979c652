"""Checkpoints of any size whose weights are zeros: files with holes, which take no disk and no time to write."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from service.loading.shards import INDEX_NAME, SINGLE_NAME

_TAGS = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write_sparse_checkpoint(
    folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype = torch.bfloat16, num_shards: int = 1
) -> Path:
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
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    if num_shards == 1:
        _write_shard(folder / SINGLE_NAME, shapes, dtype)
        return folder
    weight_map = {name: f"model-{number % num_shards}.safetensors" for number, name in enumerate(shapes)}
    for shard in set(weight_map.values()):
        _write_shard(folder / shard, {name: shapes[name] for name in shapes if weight_map[name] == shard}, dtype)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    header: dict[str, object] = {}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TAGS[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
