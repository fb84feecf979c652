"""Checkpoints that broke on their way: each is refused with the name of the file, or is served as it was."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.assembly import read_tokenizer
from service.errors import CheckpointError, ModelError, ModelNotFound
from service.loading.checkpoint import Checkpoint
from service.loading.shards import PICKLE_SINGLE_NAME, SINGLE_NAME
from tests.loading.support import load
from tests.models import write_checkpoint

NUM_FLIPS = 256


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in two shards; not to be changed."""
    return write_checkpoint("llama", tmp_path_factory.mktemp("whole") / "m", num_shards=2)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "m"))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def ignore_bytes(_: int) -> None:
    """A progress callback for tests that do not look at it."""


@pytest.mark.parametrize("recipe", ["none", "w8a16"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.99999])
def test_a_shard_that_was_cut_is_named(share: float, recipe: str, folder: Path) -> None:
    second = shards_of(folder)[1]
    with second.open("r+b") as file:
        file.truncate(int(second.stat().st_size * share))
    with pytest.raises(CheckpointError, match=f"{second.name} is not a whole safetensors file: .*; download"):
        load(folder, recipe)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"],
)
def test_a_file_that_may_not_be_read_is_named(name: str, folder: Path, as_nobody: Callable[[Path], None]) -> None:
    assert (folder / name).is_file()
    as_nobody(folder)
    with as_owner():
        (folder / name).chmod(0)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be (read|used) \(Permission.*\); make it readable"):
        load(folder, "w8a16")


@contextmanager
def as_owner() -> Iterator[None]:
    """Within it a test is the user again that it began as."""
    uid = os.geteuid()
    os.seteuid(os.getuid())
    try:
        yield
    finally:
        os.seteuid(uid)


def test_an_index_without_shards_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=r"index.json is damaged \(it names no shards\); download"):
        load(folder, "w8a16")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_generation_config_that_is_none_is_named(text: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"m: generation_config.json cannot be used .*; make it readable, down"):
        load(folder, "w8a16")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_tokenizer_that_is_none_is_named(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=r"m: its tokenizer does not load \(.*\); "):
        read_tokenizer(folder, "m", trust_remote_code=False)


@pytest.mark.parametrize("model", ["~nobody-of-this-name/m", "m" * 4096, "./" + "m" * 300])
def test_a_name_that_no_folder_can_have_is_not_found(model: str) -> None:
    with pytest.raises(ModelNotFound, match=r"no such directory; give|neither a local directory nor a hub id"):
        load(Path(model))


def test_a_file_of_pickles_that_was_cut_is_named(folder: Path) -> None:
    tensors = {name: tensor for shard in shards_of(folder) for name, tensor in load_file(shard).items()}
    for path in [*shards_of(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    path = folder / PICKLE_SINGLE_NAME
    torch.save(tensors, path)
    assert load(folder, "w8a16").report.weight_bytes.total
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{PICKLE_SINGLE_NAME} is .*download"):
        load(folder, "w8a16")


def header_facts(folder: Path) -> dict[str, Any]:
    with Checkpoint(folder, ignore_bytes) as checkpoint:
        return {name: (ref.path, ref.tag, ref.shape, ref.begin, ref.end) for name, ref in checkpoint.refs.items()}


def test_no_flipped_bit_of_a_header_gives_another_model(folder: Path) -> None:
    """What still parses has another name for a tensor, which the load misses, or another remark of its writer."""
    shard = shards_of(folder)[0]
    raw = shard.read_bytes()
    facts = header_facts(folder)
    num_header_bytes = 8 + int.from_bytes(raw[:8], "little")
    source = random.Random(8)
    num_refused = num_parsed = num_renamed = 0
    for bit in source.sample(range(8 * num_header_bytes), NUM_FLIPS):
        broken = bytearray(raw)
        broken[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(broken)
        try:
            found = header_facts(folder)
        except CheckpointError as error:
            num_refused += shard.name in str(error)
            continue
        num_parsed += 1
        if found == facts:
            continue  # of the remarks of its writer
        assert found.keys() != facts.keys()
        if not num_renamed:
            with pytest.raises(CheckpointError, match="the checkpoint lacks "):
                load(folder, "w8a16")
        num_renamed += 1
    assert num_refused + num_parsed == NUM_FLIPS
    assert num_refused > 0
    assert num_renamed > 0


@pytest.mark.parametrize("recipe", ["none", "w8a16", "w4a16"])
def test_a_flipped_bit_that_makes_a_weight_no_number_is_named(recipe: str, tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors = load_file(folder / SINGLE_NAME)
    tensors[name].view(torch.int32)[3, 3] = 0x7F800001
    save_file(tensors, folder / SINGLE_NAME)
    with pytest.raises(ModelError, match=name):
        load(folder, recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 80}, r"has shape \[.*64.*\] in the checkpoint, the config asks for \[.*80.*\]"),
        ({"intermediate_size": 97}, r"has shape \[64, 96\] in the checkpoint, the config asks for \[64, 97\]"),
        ({"vocab_size": 299}, r"has shape \[300, 64\] in the checkpoint, the config asks for \[299, 64\]"),
        ({"num_hidden_layers": 4}, r"the checkpoint lacks model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"the checkpoint holds model\.layers\.2\."),
        ({"num_key_value_heads": 4}, r"has shape \[32, 64\] in the checkpoint, the config asks for \[64, 64\]"),
        ({"attention_bias": True}, r"the checkpoint lacks model\.layers\.0\.self_attn\.\w_proj\.bias"),
        ({"tie_word_embeddings": True}, None),
    ],
    ids=["width", "inner width", "vocabulary", "more layers", "fewer layers", "heads", "biases", "tied"],
)
def test_a_config_of_other_sizes_is_refused_with_both(
    changes: dict[str, object], message: str | None, folder: Path
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for recipe in ("none", "w8a16"):
        if message is None:  # two weights are two, whatever the config says
            assert load(folder, recipe).report.honesty.num_tensors
            continue
        with pytest.raises(CheckpointError, match=message):
            load(folder, recipe)


def test_a_broken_load_leaves_nothing_behind_that_breaks_the_next(folder: Path, whole: Path) -> None:
    expected = load(whole, "w8a16").report.weight_hash
    first, second = shards_of(folder)
    raw = second.read_bytes()
    damage: dict[str, Callable[[], object]] = {
        "cut": lambda: second.write_bytes(raw[:-1]),
        "gone": second.unlink,
        "twice": lambda: second.write_bytes(first.read_bytes()),
    }
    for damaged in damage.values():
        damaged()
        with pytest.raises(CheckpointError, match=second.name):
            load(folder, "w8a16")
        second.write_bytes(raw)
        assert load(folder, "w8a16").report.weight_hash == expected
