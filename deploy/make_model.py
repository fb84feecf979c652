"""Write a checkpoint of random weights in the shape of a known model, for trials and benchmarks.

    python deploy/make_model.py --shape llama-1b OUT

Nothing is downloaded. Weights are written shard by shard, so that memory holds one shard. The tokenizer is the
demo model's, with more merges until every id of the vocabulary has a text of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from service.demo import model_folder

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
    "smollm-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "llama-800m": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
}

SHARD_BYTES = 200_000_000
END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model_config(shape: str) -> LlamaConfig:
    """Configuration of one of SHAPES, in bfloat16."""
    return LlamaConfig(**SHAPES[shape], bos_token_id=0, eos_token_id=0, pad_token_id=0, dtype="bfloat16")


def weight_shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of the checkpoint, in the order of the model; a tied head is left out."""
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tensor.shape for name, tensor in state.items() if name not in tied}


def write_checkpoint(folder: Path, config: LlamaConfig, *, seed: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Write configuration, tokenizer and weights.

    Args:
        folder: is made if it does not exist.
        seed: the same seed gives the same bytes, whatever `shard_bytes` is.
        shard_bytes: a shard is at most that long, unless one tensor is longer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    write_tokenizer(folder, config)
    write_weights(folder, config, seed=seed, shard_bytes=shard_bytes)


def write_weights(folder: Path, config: LlamaConfig, *, seed: int, shard_bytes: int) -> None:
    """Write bfloat16 shards and their index; norms are one, everything else is normal with the usual spread."""
    generator = torch.Generator().manual_seed(seed)
    shapes = weight_shapes(config)
    shards = list(_shards(shapes, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in names}
        for tensor in tensors.values():
            if tensor.dim() > 1:
                tensor.normal_(0, config.initializer_range, generator=generator)
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        (folder / file_name).chmod(0o644)  # safetensors writes 0600, which another user's container cannot read
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": _num_bytes(shapes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_tokenizer(folder: Path, config: LlamaConfig) -> None:
    """Write a byte-level BPE tokenizer with as many tokens as the model has, and a chat template."""
    tokenizer = json.loads((model_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    _extend(tokenizer["model"], config.vocab_size)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer)),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=config.max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 the disk is too small, 2 (raised by argparse) bad usage."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights; nothing is downloaded.")
    parser.add_argument("--shape", choices=SHAPES, required=True, help="the model whose shape it has")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, empty or not there yet")
    options = parser.parse_args(arguments)
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out}: must be an empty folder or not there yet; choose another or remove it")
    config = model_config(options.shape)
    num_bytes = _num_bytes(weight_shapes(config))
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < num_bytes:
        print(f"{out}: {free} bytes are free, the weights take {num_bytes}; choose another disk", file=sys.stderr)
        return 1
    write_checkpoint(out, config, seed=options.seed)
    print(f"{out}: {options.shape}, {num_bytes // 2:,} parameters, {num_bytes:,} bytes")
    return 0


def _num_bytes(shapes: dict[str, torch.Size]) -> int:
    return sum(torch.bfloat16.itemsize * math.prod(shape) for shape in shapes.values())


def _shards(shapes: dict[str, torch.Size], shard_bytes: int) -> Iterator[list[str]]:
    """Names of each shard, in order."""
    names: list[str] = []
    used = 0
    for name, shape in shapes.items():
        num_bytes = torch.bfloat16.itemsize * math.prod(shape)
        if names and used + num_bytes > shard_bytes:
            yield names
            names, used = [], 0
        names.append(name)
        used += num_bytes
    yield names


def _extend(bpe: dict[str, Any], vocab_size: int) -> None:
    """Join beginnings and continuations of words, both of them tokens already, until the vocabulary is full."""
    vocab: dict[str, int] = bpe["vocab"]
    continuations = [piece for piece in vocab if piece.isascii() and piece.isalpha()]
    beginnings = [piece for piece in vocab if piece[0] == "Ġ" and piece[1:] in continuations]
    for beginning, continuation in product(beginnings, continuations):
        if len(vocab) >= vocab_size:
            return
        if (joined := beginning + continuation) not in vocab:
            vocab[joined] = len(vocab)
            bpe["merges"].append([beginning, continuation])


if __name__ == "__main__":
    sys.exit(main())
