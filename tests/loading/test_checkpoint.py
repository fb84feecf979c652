"""The lazy reader against the safetensors library, and every kind of damage that can be seen in a header."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from service.errors import CheckpointError, ModelNotFound
from service.loading.checkpoint import Checkpoint
from service.loading.shards import INDEX_NAME, SINGLE_NAME

TENSORS = {
    "b.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "a.bias": torch.linspace(-1, 1, 7).to(torch.bfloat16),
    "c": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 5, dtype=torch.float16),
}


def ignore_bytes(_: int) -> None:
    """A progress callback for tests that do not look at it."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE_NAME)
    return tmp_path


def test_every_tensor_reads_as_the_safetensors_library_reads_it(folder: Path) -> None:
    expected = load_file(folder / SINGLE_NAME)
    with Checkpoint(folder, ignore_bytes) as checkpoint:
        assert checkpoint.refs.keys() == expected.keys()
        for name, ref in checkpoint.refs.items():
            tensor = ref.read()
            assert tensor.dtype == expected[name].dtype == ref.dtype
            assert ref.get_shape() == list(expected[name].shape)
            assert torch.equal(tensor, expected[name])


def test_opening_reads_no_tensor_and_reading_counts_every_byte(folder: Path) -> None:
    counted: list[int] = []
    with Checkpoint(folder, counted.append) as checkpoint:
        assert counted == []
        for ref in checkpoint.refs.values():
            ref.read()
        expected = sum(tensor.nbytes for tensor in TENSORS.values())
        assert sum(counted) == checkpoint.meter.num_bytes == checkpoint.num_bytes == expected


def test_read_tensors_own_their_memory(folder: Path) -> None:
    with Checkpoint(folder, ignore_bytes) as checkpoint:
        first, second = checkpoint.refs["b.weight"].read(), checkpoint.refs["b.weight"].read()
    first.zero_()
    assert torch.equal(second, TENSORS["b.weight"])


def test_same_bytes_tells_equal_from_different_tensors(tmp_path: Path) -> None:
    weight = torch.randn(5, 3)
    changed = weight.clone()
    changed[4, 2] += 1
    save_file(
        {"a": weight, "b": weight.clone(), "c": changed, "d": weight.reshape(3, 5).clone()}, tmp_path / SINGLE_NAME
    )
    with Checkpoint(tmp_path, ignore_bytes) as checkpoint:
        refs = checkpoint.refs
        assert refs["a"].same_bytes(refs["b"])
        assert not refs["a"].same_bytes(refs["c"])
        assert not refs["a"].same_bytes(refs["d"])


def header_of(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(change: Callable[[dict[str, dict[str, object]]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, data = header_of(path)
        change(header)
        encoded = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)

    return damage


def cut(num_bytes: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:num_bytes])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "last byte cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut inside the header": cut(20),
    "empty file": cut(0),
    "seven bytes": cut(7),
    "header of 2^63 bytes": lambda path: path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:]),
    "header of 200 MB": lambda path: path.write_bytes(struct.pack("<Q", 200 * 2**20) + path.read_bytes()[8:]),
    "one trailing byte": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "header not UTF-8": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc"),
    "header 100,000 deep": lambda path: path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000),
    "header is a list": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "shape that does not fit": with_header(lambda header: header["b.weight"].update(shape=[4, 7])),
    "shape of 2^80 elements": with_header(lambda header: header["b.weight"].update(shape=[2**40, 2**40])),
    "negative size": with_header(lambda header: header["b.weight"].update(shape=[-4, -6])),
    "overlapping ranges": with_header(lambda header: header["b.weight"].update(data_offsets=[0, 96])),
    "range past the end": with_header(lambda header: header["b.weight"].update(data_offsets=[10**6, 10**6 + 96])),
    "unknown dtype": with_header(lambda header: header["b.weight"].update(dtype="F12")),
    "Git LFS pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "HTML error page": lambda path: path.write_text("<!DOCTYPE html><html><body>404</body></html>"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_by_file_name_as_the_safetensors_library_refuses_it(
    folder: Path, damage: Callable[[Path], object]
) -> None:
    path = folder / SINGLE_NAME
    damage(path)
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(CheckpointError, match=f"{SINGLE_NAME} is not a whole safetensors file: .*; download"):
        Checkpoint(folder, ignore_bytes)


def test_a_file_that_shrinks_after_opening_is_noticed_while_reading(folder: Path) -> None:
    with Checkpoint(folder, ignore_bytes) as checkpoint:
        last = max(checkpoint.refs.values(), key=lambda ref: ref.end)
        with (folder / SINGLE_NAME).open("r+b") as file:
            file.truncate(last.end - 1)
        with pytest.raises(
            CheckpointError, match=f"ends at byte {last.end - 1}, tensor .* needs bytes up to {last.end}"
        ):
            last.read()


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def test_shards_named_by_the_index_are_merged(tmp_path: Path) -> None:
    for number, name in enumerate(("a.bias", "b.weight")):
        save_file({name: TENSORS[name]}, tmp_path / f"model-{number}.safetensors")
    write_index(tmp_path, {"a.bias": "model-0.safetensors", "b.weight": "model-1.safetensors"})
    with Checkpoint(tmp_path, ignore_bytes) as checkpoint:
        assert {name: ref.path.name for name, ref in checkpoint.refs.items()} == {
            "a.bias": "model-0.safetensors",
            "b.weight": "model-1.safetensors",
        }


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a.bias"]}, tmp_path / "model-0.safetensors")
    write_index(tmp_path, {"a": "model-0.safetensors", "b": "model-1.safetensors"})
    with pytest.raises(CheckpointError, match=r"1 of 2 shards .* missing, first model-1\.safetensors"):
        Checkpoint(tmp_path, ignore_bytes)


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        save_file({"a": TENSORS["a.bias"]}, tmp_path / f"model-{number}.safetensors")
    write_index(tmp_path, {"a": "model-0.safetensors", "b": "model-1.safetensors"})
    with pytest.raises(CheckpointError, match="'a' is in both model-0"):
        Checkpoint(tmp_path, ignore_bytes)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}], ids=["null", "list", "number"])
def test_a_damaged_index_is_refused(tmp_path: Path, weight_map: object) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint(tmp_path, ignore_bytes)


def test_an_index_cannot_name_files_outside_of_its_folder(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    write_index(inner, {"a": f"../{SINGLE_NAME}"})
    with pytest.raises(CheckpointError, match="outside of its folder"):
        Checkpoint(inner, ignore_bytes)


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=f"neither {SINGLE_NAME} nor {INDEX_NAME}"):
        Checkpoint(tmp_path, ignore_bytes)
