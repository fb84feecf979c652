"""From an artifact to the model that it was written from."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.monkey_patching import patch_output_recorders
from transformers.utils.generic import ContextManagers

from service.errors import ArtifactError
from service.loading.artifact import BLOCK_BYTES, DATA_NAME, MANIFEST_NAME, Manifest, StoredTensor, parse_manifest
from service.loading.config import ServedModel, class_errors
from service.loading.quantizer import LoadQuantizationConfig, LoadQuantizer
from service.loading.record import EncodedLayer, LoadRecord
from service.numerics.recipe import Recipe

_MAX_THREADS: Final = 4
_RUN_BYTES: Final = 8 * BLOCK_BYTES
_RUN_BLOCKS: Final = 512  # below the 1024 buffers that one preadv takes


class _Block(NamedTuple):
    """A block of a tensor: its memory and its checksum."""

    view: memoryview
    checksum: str


class _Run(NamedTuple):
    """Blocks that follow one another in the file, from `begin` on."""

    begin: int
    blocks: list[_Block]


class OpenArtifact:
    """An artifact open for reading; a context manager, within which no cache removes it.

    Attributes:
        manifest: what it holds.
    """

    def __init__(self, folder: Path) -> None:
        """Open the two files.

        Raises:
            ArtifactError: one is missing, damaged or of another version, or the artifact is being removed.
        """
        self._fds: list[int] = []
        self._path = folder / DATA_NAME
        try:
            manifest_fd = self._open(folder / MANIFEST_NAME)
            fcntl.flock(manifest_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            with open(manifest_fd, "rb", closefd=False) as file:
                self.manifest = parse_manifest(file.read(), folder / MANIFEST_NAME)
            self._fd = self._open(self._path)
            found, expected = os.fstat(self._fd).st_size, self.manifest.num_bytes
            if found != expected:
                raise ArtifactError(f"{self._path}: {found} bytes instead of {expected}; quantize the model again")
        except OSError as error:
            self.close()
            raise ArtifactError(f"{folder}: cannot be read ({error.strerror}); quantize the model again") from error
        except BaseException:
            self.close()
            raise

    def read(self, on_bytes: Callable[[int], None], *, verify_full: bool) -> list[Tensor]:
        """All tensors, read into the memory where they will stay, and compared with their checksums.

        Each has memory of its own, but for those that are joined.

        Args:
            on_bytes: called with the bytes of each read, by several threads.
            verify_full: compare the whole file with its sha256 too.

        Raises:
            ArtifactError: a block is not what was written, or cannot be read.
        """
        stored = self.manifest.tensors
        flat = _allocate(stored)
        num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(num_threads, thread_name_prefix="artifact") as pool:
            for num_bytes in pool.map(self._read_run, self._runs(flat)):
                on_bytes(num_bytes)
        if verify_full:
            digest = hashlib.sha256()
            for buffer in flat:
                digest.update(memoryview(buffer.numpy().data))
            if digest.hexdigest() != self.manifest.sha256:
                raise self._damaged("its sha256 is another")
        return [
            buffer.view(getattr(torch, tensor.dtype)).view(tensor.shape)
            for buffer, tensor in zip(flat, stored, strict=True)
        ]

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, path: Path) -> int:
        self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self._fds[-1]

    def _runs(self, flat: list[Tensor]) -> Iterator[_Run]:
        """All blocks, in runs that are read at once."""
        run, num_bytes = _Run(0, []), 0
        for stored, buffer in zip(self.manifest.tensors, flat, strict=True):
            view = memoryview(buffer.numpy().data)
            for index, begin in enumerate(range(0, len(view), BLOCK_BYTES)):
                if num_bytes >= _RUN_BYTES or len(run.blocks) == _RUN_BLOCKS:
                    yield run
                    run, num_bytes = _Run(stored.begin + begin, []), 0
                block = view[begin : begin + BLOCK_BYTES]
                run.blocks.append(_Block(block, stored.block_checksum(index)))
                num_bytes += len(block)
        yield run

    def _read_run(self, run: _Run) -> int:
        """Read and check; the bytes."""
        left, position = [block.view for block in run.blocks], run.begin
        while left:
            try:
                count = os.preadv(self._fd, left, position)
            except OSError as error:
                raise self._damaged(f"byte {position} cannot be read: {error.strerror}") from error
            if count == 0:
                raise self._damaged(f"it ends at byte {position}")
            position += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
        begin = run.begin
        for block in run.blocks:
            if xxhash.xxh3_64_hexdigest(block.view) != block.checksum:
                raise self._damaged(f"the block at byte {begin} is not what was written")
            begin += len(block.view)
        return position - run.begin

    def _damaged(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self._path}: damaged, {what}; quantize the model again")


def _allocate(stored: Sequence[StoredTensor]) -> list[Tensor]:
    """Bytes for each tensor; one allocation for those that are joined."""
    groups: list[list[int]] = []
    for tensor in stored:
        if tensor.is_joined and groups:
            groups[-1].append(tensor.num_bytes)
        else:
            groups.append([tensor.num_bytes])
    return [part for sizes in groups for part in torch.split(torch.empty(sum(sizes), dtype=torch.uint8), sizes)]


def restore_model(
    opened: OpenArtifact,
    served: ServedModel,
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    on_bytes: Callable[[int], None],
    verify_full: bool,
) -> tuple[PreTrainedModel, LoadRecord]:
    """Build the model and fill it; what a load of the source with this recipe would have made, and its record.

    Raises:
        ArtifactError: it is damaged, or of a model with other tensors.
        ModelError: the model's class fails.
    """
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(opened.read, on_bytes, verify_full=verify_full)
        try:
            model, record = _empty_model(served, recipe, dtype)
            _install(model, opened.manifest, reading.result())
        finally:
            # Else an error and this would hold each other, and all that was read, until garbage is collected.
            del reading
    record.encoded.update({name: EncodedLayer(*sums) for name, sums in opened.manifest.layers.items()})
    return model, record


def _empty_model(served: ServedModel, recipe: Recipe, dtype: torch.dtype) -> tuple[PreTrainedModel, LoadRecord]:
    """The model on the meta device, with quantized layers; made as `from_pretrained` makes it around its reading."""
    record = LoadRecord()
    config = copy.deepcopy(served.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    quantizer = LoadQuantizer(LoadQuantizationConfig(recipe, record), pre_quantized=False)
    with class_errors(), ContextManagers(served.model_class.get_init_context(dtype, True, False, None)):
        model: PreTrainedModel = served.model_class(config)
        patch_output_recorders(model)
        quantizer.preprocess_model(model, dtype)
        quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.train(False)
    model.requires_grad_(False)
    return model, record


def _install(model: nn.Module, manifest: Manifest, tensors: list[Tensor]) -> None:
    """Put each tensor in all of its places."""
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = {
        f"{prefix}.{leaf}".removeprefix(".")
        for prefix, module in modules.items()
        for leaf, member in (*module._parameters.items(), *module._buffers.items())
        if member is not None
    }
    for stored, tensor in zip(manifest.tensors, tensors, strict=True):
        value = nn.Parameter(tensor, requires_grad=False) if stored.kind == "parameter" else tensor
        for name in stored.names:
            prefix, _, leaf = name.rpartition(".")
            module = modules.get(prefix)
            if module is None or not _fits(module, leaf, stored.kind, tensor):
                raise ArtifactError(f"the artifact holds {name}, which the model of its config has not in this form")
            missing.discard(name)
            _members(module, stored.kind)[leaf] = value
    if missing:
        raise ArtifactError(f"the artifact lacks {min(missing)}, and {len(missing) - 1} more of the model's tensors")


def _fits(module: nn.Module, leaf: str, kind: str, tensor: Tensor) -> bool:
    if kind == "attribute":
        return True
    member = _members(module, kind).get(leaf)
    return member is not None and member.shape == tensor.shape


def _members(module: nn.Module, kind: str) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {
        "parameter": module._parameters,
        "buffer": module._buffers,
        "attribute": vars(module),
    }[kind]  # type: ignore[assignment]
    return found
