from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from service.errors import ArtifactError
from service.kernels.dispatch import encode
from service.loading import artifact
from service.loading.artifact import BLOCK_BYTES, DATA_NAME, MANIFEST_NAME, read_manifest
from service.loading.artifact_read import OpenArtifact
from service.loading.artifact_write import ModelContents, places_of, write_artifact
from service.numerics.schemes import parse_scheme
from tests.loading.artifacts import load_and_save, the_entry

NUM_FLIPS = 256


@pytest.fixture(scope="module")
def whole(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a tiny Llama; not to be changed."""
    cache = tmp_path_factory.mktemp("cache")
    load_and_save(cache, checkpoint("llama_tied"), "w4a16-g64")
    return the_entry(cache)


@pytest.fixture
def entry(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def read(folder: Path, *, verify_full: bool = False) -> None:
    with OpenArtifact(folder) as opened:
        opened.read(lambda _: None, verify_full=verify_full)


def sign(folder: Path, **changes: object) -> None:
    """Change fields of a manifest, and give it the checksum of what it says then."""
    text = (folder / MANIFEST_NAME).read_bytes()
    fields = json.loads(text) | changes
    fields.pop("checksum")
    body = ('",\n' + json.dumps(fields, indent=1).removeprefix("{\n")).encode()
    (folder / MANIFEST_NAME).write_bytes(b'{"checksum": "' + hashlib.sha256(body).hexdigest().encode() + body)


def test_an_artifact_that_nobody_touched_is_read(entry: Path) -> None:
    read(entry, verify_full=True)
    sign(entry)
    read(entry, verify_full=True)


def test_every_flipped_bit_is_found(entry: Path) -> None:
    choice = random.Random(0)
    paths = [entry / DATA_NAME, entry / MANIFEST_NAME]
    for index in range(NUM_FLIPS):
        path = paths[index % 2]
        before = path.read_bytes()
        position, bit = choice.randrange(len(before)), choice.randrange(8)
        flipped = bytearray(before)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError, match=r"damaged"):
            read(entry)
        path.write_bytes(before)
    read(entry)


@pytest.mark.parametrize("name", [DATA_NAME, MANIFEST_NAME])
@pytest.mark.parametrize("change", [-1, 1], ids=["shorter", "longer"])
def test_a_file_of_another_length_is_found(entry: Path, name: str, change: int) -> None:
    content = (entry / name).read_bytes()
    (entry / name).write_bytes(content[:-1] if change < 0 else content + b"\n")
    with pytest.raises(ArtifactError, match=r"damaged|bytes instead of"):
        read(entry)


@pytest.mark.parametrize("name", [DATA_NAME, MANIFEST_NAME])
def test_a_missing_file_is_found(entry: Path, name: str) -> None:
    (entry / name).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        read(entry)


@pytest.mark.parametrize("version", ["format", "layout", "numerics"])
def test_an_artifact_of_another_version_is_not_read(entry: Path, version: str) -> None:
    sign(entry, **{version: 0})
    with pytest.raises(ArtifactError, match=r"of version [01]\.[01]\.[01], this program reads 1\.1\.1; quantize"):
        read(entry)


def test_the_sha256_is_compared_only_if_asked_for(entry: Path) -> None:
    sign(entry, sha256="0" * 64)
    read(entry)
    with pytest.raises(ArtifactError, match="its sha256 is another"):
        read(entry, verify_full=True)


@pytest.mark.parametrize(
    "change",
    [
        {"begin": 64},
        {"begin": -1},
        {"shape": [1]},
        {"shape": [-1, -1]},
        {"shape": [2.0]},
        {"dtype": "float3"},
        {"kind": "secret"},
        {"names": []},
        {"checksums": ""},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself_is_refused(entry: Path, change: dict[str, object]) -> None:
    first, *others = json.loads((entry / MANIFEST_NAME).read_bytes())["tensors"]
    sign(entry, tensors=[first | change, *others])
    with pytest.raises(ArtifactError, match="no manifest of an artifact"):
        read(entry)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff" * 100, b'{"model_type": "llama"}'], ids=repr)
def test_another_file_is_no_manifest(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(ArtifactError, match="damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 20 * BLOCK_BYTES + 3])
def test_a_tensor_of_any_size_comes_back(tmp_path: Path, num_bytes: int) -> None:
    module = torch.nn.Module()
    tensor = torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in ("first", "second"):
        module.register_buffer(name, tensor.clone())
    module.register_parameter("third", torch.nn.Parameter(torch.tensor(0.5)))
    contents = ModelContents(places=places_of(module), recipe="w8a16", dtype="float32", is_tied=False, layers={})
    manifest = write_artifact(tmp_path, contents, facts={})
    assert manifest.num_bytes == contents.num_bytes == 2 * num_bytes + 4
    assert (tmp_path / DATA_NAME).stat().st_size == manifest.num_bytes
    assert read_manifest(tmp_path) == manifest
    with OpenArtifact(tmp_path) as opened:
        parameter, *both = opened.read(lambda _: None, verify_full=True)
    assert all(torch.equal(found, tensor) for found in both)
    assert parameter == 0.5


# Whoever changes codes, scales or their layout on purpose also raises NUMERICS_VERSION or LAYOUT_VERSION, and then
# writes down what comes out: artifacts of before would otherwise be served as if they had been made now.
ENCODED = {
    "w8a16": "1576ac6b953ead81",
    "w8a16-g64": "67ea3e21641c7c52",
    "w4a16-g64": "f25db2de4a32acf3",
    "w4a16-g128-sym": "103d9cbf4ebc9712",
    "nf4": "3520bc1097011002",
    "fp4": "ecfd57b483302386",
}


@pytest.mark.parametrize("scheme", ENCODED)
def test_codes_and_layout_are_those_of_the_version_of_artifacts(scheme: str) -> None:
    assert (artifact.NUMERICS_VERSION, artifact.LAYOUT_VERSION) == (1, 1)
    # Integers, so that no library decides how the weights are rounded.
    weight = (torch.arange(48 * 192, dtype=torch.int64) * 2654435761 % 4093 - 2046).view(48, 192).float() / 1024
    encoded = encode(weight, parse_scheme(scheme))
    digest = hashlib.sha256()
    for buffer in (encoded.qweight, encoded.scales, encoded.zero_points):
        digest.update(b"" if buffer is None else buffer.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == ENCODED[scheme]
