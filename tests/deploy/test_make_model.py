"""Random-weight checkpoints have the shape they are named after, load, and are the same for the same seed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from deploy.make_model import SHAPES, main, model_config, weight_shapes, write_checkpoint

# From the shapes by hand: per layer q and o, k and v, gate, up and down, two norms; the final norm; the embedding, and
# the head where it is not tied.
NUM_PARAMETERS = {
    "llama-1b": 22 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 5632 + 2 * 2048) + 2048 + 2 * 32000 * 2048,
    "smollm-135m": 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576) + 576 + 49152 * 576,
    "llama-800m": 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 5632 + 2 * 2048) + 2048 + 2 * 32000 * 2048,
}
VOCAB_SIZE = 5000


def tiny_config(*, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=40,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in several shards."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    write_checkpoint(folder, tiny_config(), seed=0, shard_bytes=100_000)
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_as_many_parameters_as_its_model(shape: str) -> None:
    shapes = weight_shapes(model_config(shape))
    assert sum(math.prod(size) for size in shapes.values()) == NUM_PARAMETERS[shape]
    assert ("lm_head.weight" in shapes) == (shape != "smollm-135m")


def test_transformers_loads_what_was_written(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    written = tensors(folder)
    state = model.state_dict()
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())


def test_weights_spread_as_those_of_a_new_model(folder: Path) -> None:
    written = tensors(folder)
    embedding = written["model.embed_tokens.weight"].float()
    # The standard deviation of n values is off by less than 5 / sqrt(2 n) of itself, but for one seed in a million.
    assert embedding.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * embedding.numel()))
    assert torch.equal(written["model.norm.weight"], torch.ones(24, dtype=torch.bfloat16))


def test_a_shard_is_no_longer_than_asked_unless_it_is_one_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    paths = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in paths] == sorted(set(index["weight_map"].values()))
    assert len(paths) >= 3
    shards = [load_file(path) for path in paths]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 100_000 or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))


def test_another_user_can_read_the_weights(folder: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.safetensors")} == {0o644}


def test_the_seed_alone_decides_the_weights(folder: Path, tmp_path: Path) -> None:
    written = tensors(folder)
    for name, seed, same in (("again", 0, True), ("other", 1, False)):
        write_checkpoint(tmp_path / name, tiny_config(), seed=seed, shard_bytes=10**9)
        other = tensors(tmp_path / name)
        assert torch.equal(other["lm_head.weight"], written["lm_head.weight"]) is same


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(tied=True), seed=0)
    assert "lm_head.weight" not in tensors(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_every_token_of_the_vocabulary_has_its_own_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == VOCAB_SIZE
    assert len(set(tokenizer.convert_ids_to_tokens(list(range(VOCAB_SIZE))))) == VOCAB_SIZE
    assert all(tokenizer.decode([token_id]) for token_id in range(VOCAB_SIZE))


@pytest.mark.parametrize("text", ["Once upon a time there was a ship.", " ünï 世界\n\n\t", "a\x00b"])
def test_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_marks_the_turns(folder: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Hello<|end|><|assistant|>Hi<|end|><|assistant|>"
    assert {"<|user|>", "<|assistant|>", "<|end|>"} <= set(tokenizer.tokenize(text))


def test_a_folder_with_files_is_left_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(SystemExit) as raised:
        main(["--shape", "llama-1b", str(folder)])
    assert raised.value.code == 2
    assert "must be an empty folder" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_unknown_shape_names_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--shape", "llama-2b", str(tmp_path)])
    assert raised.value.code == 2
    message = capsys.readouterr().err.split("choose from")[1]
    assert all(shape in message for shape in SHAPES)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(["--shape", "smollm-135m", str(tmp_path)]) == 1
    assert f"1000 bytes are free, the weights take {2 * NUM_PARAMETERS['smollm-135m']}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
