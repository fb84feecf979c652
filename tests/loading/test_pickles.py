"""`.bin` files against torch's own reader; nothing in them is ever run."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from service.errors import CheckpointError
from service.loading.checkpoint import Checkpoint
from service.loading.shards import PICKLE_INDEX_NAME, PICKLE_SINGLE_NAME, SINGLE_NAME
from tests.loading.support import load, logits
from tests.models import write_checkpoint

BASE = torch.arange(40, dtype=torch.float32).reshape(10, 4)
TENSORS: dict[str, torch.Tensor] = {
    "plain": torch.randn(5, 3),
    "bfloat16": torch.linspace(-1, 1, 7).to(torch.bfloat16),
    "slice": BASE[2:5],
    "transposed": BASE.t(),
    "columns": BASE[:, 1:3],
    "shared": BASE,
    "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.float16)),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 5),
}


def ignore_bytes(_: int) -> None:
    """A progress callback for tests that do not look at it."""


def write(folder: Path, state: object, **options: Any) -> Path:
    torch.save(state, folder / PICKLE_SINGLE_NAME, **options)
    return folder


def to_pickles(folder: Path, num_shards: int) -> Path:
    """Rewrite the safetensors file of a model folder as `.bin` files."""
    tensors = load_file(folder / SINGLE_NAME)
    names = list(tensors)
    if num_shards == 1:
        torch.save(tensors, folder / PICKLE_SINGLE_NAME)
    else:
        weight_map = {name: f"pytorch_model-{i % num_shards + 1:05}.bin" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            torch.save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
        (folder / PICKLE_INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / SINGLE_NAME).unlink()
    return folder


def test_every_tensor_reads_as_torch_reads_it(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    expected = torch.load(tmp_path / PICKLE_SINGLE_NAME, weights_only=True)
    counted: list[int] = []
    with Checkpoint(tmp_path, counted.append) as checkpoint:
        assert checkpoint.refs.keys() == expected.keys()
        assert counted == []
        for name, ref in checkpoint.refs.items():
            tensor = ref.read()
            assert (tensor.dtype, ref.get_shape()) == (expected[name].dtype, list(expected[name].shape))
            assert tensor.is_contiguous()
            assert torch.equal(tensor, expected[name])
        assert sum(counted) == checkpoint.num_bytes


def test_reading_a_tensor_holds_its_own_bytes_only(tmp_path: Path) -> None:
    write(tmp_path, {"large": torch.ones(1000, 1000), "small": torch.ones(3)})
    with Checkpoint(tmp_path, ignore_bytes) as checkpoint:
        assert checkpoint.refs["small"].read().untyped_storage().nbytes() == 12


@pytest.mark.parametrize("recipe", ["none", "w8a16"])
@pytest.mark.parametrize("num_shards", [1, 3], ids=["single", "sharded"])
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral"])
def test_a_model_of_bin_files_is_the_model_of_its_safetensors(
    family: str, num_shards: int, recipe: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(family, tmp_path / "m")
    expected = load(folder, recipe)
    found = load(to_pickles(folder, num_shards), recipe)
    assert torch.equal(logits(found.model), logits(expected.model))
    assert found.report.weight_bytes == expected.report.weight_bytes


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    (folder / PICKLE_SINGLE_NAME).write_bytes(b"never read")
    assert load(folder).report.saving_ratio == 0


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap", [lambda a: {"a": a}, lambda a: a, lambda a: [a]], ids=["in a dict", "bare", "in a list"]
)
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    wrap: Callable[[Attack], object], is_zip: bool, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    folder = write_checkpoint("llama", tmp_path / "m")
    (folder / SINGLE_NAME).unlink()
    write(folder, wrap(Attack(marker)), _use_new_zipfile_serialization=is_zip)
    message = "holds more than tensors, which is refused and was not run" if is_zip else "not a zip archive"
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    assert not marker.exists()
    torch.load(folder / PICKLE_SINGLE_NAME, weights_only=False)
    assert marker.exists()  # the attack would have worked


@pytest.mark.parametrize(
    "state",
    [[torch.ones(3)], {"a": 1}, {1: torch.ones(3)}, {"model": {"a": torch.ones(3)}}, torch.ones(3)],
    ids=["list", "number", "key", "nested", "bare tensor"],
)
def test_only_tensors_by_name_are_read(state: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a state dict, it must hold nothing but tensors by name"):
        Checkpoint(write(tmp_path, state), ignore_bytes)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(1).expand(1 << 40), "does not fit its 4 bytes"),
        (torch.eye(3).to_sparse(), "not a plain dense tensor"),
        (torch.ones(3, dtype=torch.complex64), "real numbers are read only"),
    ],
    ids=["one element repeated", "sparse", "complex"],
)
def test_tensors_that_are_no_plain_weights_are_refused(tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(write(tmp_path, {"a": tensor}), ignore_bytes)


def rezip(path: Path, *, compression: int = zipfile.ZIP_STORED, byteorder: bytes | None = None) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, byteorder if byteorder and name.endswith("/byteorder") else data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "not a zip archive"),
    "empty": (lambda path: path.write_bytes(b""), "not a zip archive"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "not a zip archive"),
    "compressed": (lambda path: rezip(path, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "big-endian": (lambda path: rezip(path, byteorder=b"big"), "not little-endian"),
    "another zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a", struct.pack("<Q", 1)), "torch cannot read"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    damage(write(tmp_path, TENSORS) / PICKLE_SINGLE_NAME)
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin .*{message}"):
        Checkpoint(tmp_path, ignore_bytes)
