"""From a loaded model to the two files of an artifact."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from service.errors import ArtifactError
from service.layers.buffers import QuantizedModule
from service.loading.artifact import (
    BLOCK_BYTES,
    DATA_NAME,
    ITEM_BYTES,
    MANIFEST_NAME,
    Manifest,
    StoredTensor,
)
from service.loading.background import Stopped

_SNAPSHOT_BYTES = 2**20
_PIECE_BYTES = 16 * 2**20  # whole blocks


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in a model.

    Attributes:
        names: full names, more than one if they share it.
        copy: of it as it was, where a forward may change it.
    """

    names: tuple[str, ...]
    kind: str
    module: nn.Module
    leaf: str
    copy: Tensor | None

    @property
    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.module, self.leaf) if self.copy is None else self.copy
        return found.detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelContents:
    """The tensors of a model that was just loaded, to be written now or later, and what else a manifest says of it.

    Later, layers may lie in other memory than at first, where they are fused; their tensors are asked for when they
    are written, so that nothing is held twice. Small buffers may have changed: some families adapt theirs to what
    they compute. So they are copied at once.

    Attributes:
        recipe, dtype, is_tied, layers: as a manifest has them.
    """

    places: tuple[_Place, ...]
    recipe: str
    dtype: str
    is_tied: bool
    layers: dict[str, tuple[float, float]]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(place.tensor.nbytes for place in self.places)


def places_of(model: nn.Module) -> tuple[_Place, ...]:
    """All parameters, buffers and other tensors of the modules of a model, those on the meta device left out.

    Tensors that lie in the same bytes in the same shape are one.
    """
    places: dict[tuple[int, str, torch.dtype, tuple[int, ...]], _Place] = {}
    for name, kind, module, leaf, tensor in _tensors(model):
        # Tensors without elements have no address.
        address = tensor.data_ptr() or id(tensor)
        identity = (address, kind, tensor.dtype, tuple(tensor.shape))
        if identity in places:
            known = places[identity]
            places[identity] = _Place((*known.names, name), kind, known.module, known.leaf, known.copy)
            continue
        may_change = (
            kind != "parameter" and tensor.nbytes <= _SNAPSHOT_BYTES and not isinstance(module, QuantizedModule)
        )
        places[identity] = _Place((name,), kind, module, leaf, tensor.detach().clone() if may_change else None)
    return tuple(places.values())


def write_artifact(
    folder: Path,
    contents: ModelContents,
    *,
    facts: dict[str, Any],
    config: dict[str, Any] | None = None,
    stop: threading.Event | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Write both files into an empty folder, down to the disk, the manifest last.

    Args:
        facts, config: as the manifest has them.
        stop: ends it when set.
        on_bytes: called with the bytes of each piece written.

    Raises:
        OSError: a file cannot be written.
        ArtifactError: the model has a tensor that an artifact cannot hold.
        Stopped: `stop` was set.
    """
    digest = hashlib.sha256()

    def take(piece: memoryview) -> None:
        if stop is not None and stop.is_set():
            raise Stopped
        digest.update(piece)
        on_bytes(len(piece))

    with (folder / DATA_NAME).open("xb", buffering=0) as file:
        tensors = tuple(
            _write_tensor(file, place, take, is_joined=is_joined) for place, is_joined in _as_they_lie(contents.places)
        )
        os.fsync(file.fileno())
    manifest = Manifest(
        facts=facts,
        recipe=contents.recipe,
        dtype=contents.dtype,
        is_tied=contents.is_tied,
        layers=contents.layers,
        config=config,
        sha256=digest.hexdigest(),
        tensors=tensors,
    )
    write_durably(folder / MANIFEST_NAME, manifest.to_bytes())
    sync_folder(folder)
    return manifest


def _as_they_lie(places: tuple[_Place, ...]) -> Iterator[tuple[_Place, bool]]:
    """All places, those in one storage side by side; and whether each lies right behind the one before it."""
    storages: dict[int, list[_Place]] = {}
    for place in places:
        storages.setdefault(place.tensor.untyped_storage().data_ptr() or id(place), []).append(place)
    for group in storages.values():
        before: Tensor | None = None
        for place in sorted(group, key=lambda place: place.tensor.data_ptr()):
            tensor = place.tensor
            yield place, before is not None and _is_right_behind(tensor, before)
            before = tensor


def _is_right_behind(tensor: Tensor, before: Tensor) -> bool:
    is_next = tensor.data_ptr() == before.data_ptr() + before.nbytes
    return is_next and tensor.dtype == before.dtype and tensor.is_contiguous() and before.is_contiguous()


def _write_tensor(
    file: io.FileIO, place: _Place, on_piece: Callable[[memoryview], None], *, is_joined: bool
) -> StoredTensor:
    tensor, begin = place.tensor, file.tell()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise ArtifactError(f"{place.names[0]} is of {dtype}, which no artifact holds; serve the model itself")
    checksums = []
    for piece in _pieces(tensor):
        on_piece(piece)
        written = 0
        while written < len(piece):
            written += os.write(file.fileno(), piece[written:])
        checksums += [xxhash.xxh3_64_hexdigest(block) for block in _blocks(piece)]
    return StoredTensor(
        names=place.names,
        kind=place.kind,
        dtype=dtype,
        shape=tuple(tensor.shape),
        begin=begin,
        checksums="".join(checksums),
        is_joined=is_joined,
    )


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, down to the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, str, Tensor]]:
    """Full name, kind, module and name in it of each tensor, under all of its names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for kind, members in (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", vars(module)),
        ):
            for leaf, member in members.items():
                if isinstance(member, Tensor) and not member.is_meta:
                    yield f"{prefix}.{leaf}".removeprefix("."), kind, module, leaf, member


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in order, a whole number of blocks at a time."""
    flat = tensor.contiguous().reshape(-1)
    for chunk in torch.split(flat, _PIECE_BYTES // tensor.itemsize) if tensor.numel() else ():
        yield memoryview(chunk.cpu().view(torch.uint8).numpy().data)


def _blocks(piece: memoryview) -> Iterator[memoryview]:
    return (piece[begin : begin + BLOCK_BYTES] for begin in range(0, len(piece), BLOCK_BYTES))
