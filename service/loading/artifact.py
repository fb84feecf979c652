"""What an artifact is: a quantized model as files, its tensors exactly as they lie in memory. No torch.

    tensors.bin       every tensor, one behind the other, with nothing between them
    pennyweight.json  what they are and where they lie, the errors of the layers, checksums

Each tensor is cut into blocks of 1 MiB, the last one shorter, and each block has its xxh3 in the manifest; the whole
of `tensors.bin` has a sha256. The manifest begins with the sha256 of all that follows it, so that no bit of the two
files can change without being noticed. In a folder that `pennyweight quantize` writes, it stands in the place of
`config.json`, which it holds, and which other programs would take for that of an unquantized model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from service.errors import ArtifactError

FORMAT_VERSION: Final = 1
"""Of the two files. It grows when they change so that an older reader would misread them."""
LAYOUT_VERSION: Final = 1
"""Of packed buffers (`numerics.packing`, `numerics.encode`). It grows when kernels read the same bytes differently."""
NUMERICS_VERSION: Final = 1
"""Of the codes and scales that a weight gets. It grows when the same weight and scheme give other ones."""

MANIFEST_NAME: Final = "pennyweight.json"
DATA_NAME: Final = "tensors.bin"
BLOCK_BYTES: Final = 2**20
CHECKSUM_DIGITS: Final = 16
"""Hexadecimal digits of an xxh3 of 64 bit."""
ITEM_BYTES: Final = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""The dtypes of tensors in an artifact, by torch's names."""
KINDS: Final = ("parameter", "buffer", "attribute")
"""What a tensor is in its module."""

_MAX_MANIFEST_BYTES = 2**28
_BEGIN = b'{"checksum": "'
_DIGEST_END = len(_BEGIN) + 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of `tensors.bin`.

    Attributes:
        names: full names in the model, more than one if they share it.
        kind: of `KINDS`.
        dtype: torch's name of it.
        begin: its first byte in the file.
        checksums: hexadecimal xxh3 of its blocks, one behind the other.
        is_joined: it lies behind the one before it in memory too, where layers that are fused want it.
    """

    names: tuple[str, ...]
    kind: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    checksums: str
    is_joined: bool

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def block_checksum(self, index: int) -> str:
        """Hexadecimal xxh3 of one block."""
        return self.checksums[index * CHECKSUM_DIGITS : (index + 1) * CHECKSUM_DIGITS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `pennyweight.json` says.

    Attributes:
        facts: all that decides about the tensors; see `artifact_key`.
        recipe: canonical text.
        dtype: of activations and unquantized weights, torch's name.
        is_tied: head and embedding share their weight.
        layers: sums of squares of each quantized weight and of its error, by the name of its layer.
        config: the model's config.json, in a folder that holds all of a model; None in a cache.
        sha256: of `tensors.bin`, hexadecimal.
        tensors: in the order of the file.
    """

    facts: dict[str, Any]
    recipe: str
    dtype: str
    is_tied: bool
    layers: dict[str, tuple[float, float]]
    config: dict[str, Any] | None
    sha256: str
    tensors: tuple[StoredTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Size of `tensors.bin`."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def to_bytes(self) -> bytes:
        """The file."""
        fields = {"format": FORMAT_VERSION, "layout": LAYOUT_VERSION, "numerics": NUMERICS_VERSION} | asdict(self)
        body = ('",\n' + json.dumps(fields, indent=1).removeprefix("{\n") + "\n").encode()
        return _BEGIN + hashlib.sha256(body).hexdigest().encode() + body


def artifact_key(facts: dict[str, Any]) -> str:
    """The name of an artifact in a cache: hexadecimal sha256 of all that decides about its tensors, and of versions."""
    versions = {"format": FORMAT_VERSION, "layout": LAYOUT_VERSION, "numerics": NUMERICS_VERSION}
    return hashlib.sha256(json.dumps(versions | facts, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `pennyweight.json`.

    Raises:
        ArtifactError: it is missing, damaged, of another version or contradicts itself.
    """
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_MANIFEST_BYTES)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); quantize the model again") from error
    return parse_manifest(text, path)


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """Check what `pennyweight.json` holds; errors as above, `path` is for them."""
    digest, body = text[len(_BEGIN) : _DIGEST_END], text[_DIGEST_END:]
    if not text.startswith(_BEGIN) or digest != hashlib.sha256(body).hexdigest().encode():
        raise ArtifactError(f"{path}: damaged, its checksum is not that of its text; quantize the model again")
    try:
        fields = json.loads(text)
        versions = tuple(fields.pop(name) for name in ("format", "layout", "numerics"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _foreign(path, error) from error
    if versions != (FORMAT_VERSION, LAYOUT_VERSION, NUMERICS_VERSION):
        raise ArtifactError(
            f"{path}: of version {'.'.join(map(str, versions))}, this program reads "
            f"{FORMAT_VERSION}.{LAYOUT_VERSION}.{NUMERICS_VERSION}; quantize the model again"
        )
    try:
        return _manifest(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(path, error) from error


def is_artifact(folder: Path) -> bool:
    """Whether a model folder is an artifact."""
    return os.path.isfile(folder / MANIFEST_NAME)  # of a name that is no path too


def own_config(folder: Path) -> dict[str, Any]:
    """The config of the model in an artifact that holds all of one.

    Raises:
        ArtifactError: it is damaged, or the artifact is a cache's, which holds only the tensors.
    """
    config = read_manifest(folder).config
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder}: holds the tensors of a model only; give the model that it was made from")
    return config


def stored_bytes(folder: Path) -> int:
    """Bytes of all files of an artifact."""
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False))


def _manifest(fields: dict[str, Any]) -> Manifest:
    fields.pop("checksum")
    layers = {str(name): (float(signal), float(noise)) for name, (signal, noise) in fields.pop("layers").items()}
    tensors = tuple(_stored_tensor(**row) for row in fields.pop("tensors"))
    manifest = Manifest(layers=layers, tensors=tensors, **fields)
    position, before = 0, ""
    for tensor in tensors:
        if tensor.begin != position or (tensor.is_joined and tensor.dtype != before):
            raise ValueError("tensors that do not follow one another")
        position += tensor.num_bytes
        before = tensor.dtype
    if not isinstance(manifest.recipe, str) or manifest.dtype not in ITEM_BYTES or not isinstance(manifest.facts, dict):
        raise ValueError("a recipe, dtype or facts that are none")
    return manifest


def _stored_tensor(
    *, names: list[str], kind: str, dtype: str, shape: list[int], begin: int, checksums: str, is_joined: bool
) -> StoredTensor:
    tensor = StoredTensor(
        names=tuple(map(str, names)),
        kind=kind,
        dtype=dtype,
        shape=tuple(shape),
        begin=begin,
        checksums=checksums,
        is_joined=bool(is_joined),
    )
    num_blocks = -(-tensor.num_bytes // BLOCK_BYTES)
    sizes_fit = all(type(size) is int and size >= 0 for size in (*tensor.shape, begin))
    if not names or kind not in KINDS or not sizes_fit or len(checksums) != num_blocks * CHECKSUM_DIGITS:
        raise ValueError(f"tensor {names}")
    return tensor


def _foreign(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path}: no manifest of an artifact ({type(error).__name__}); give a folder that `pennyweight quantize` wrote"
    )
