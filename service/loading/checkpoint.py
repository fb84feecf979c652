"""Checkpoints as a lazy state dict: nothing is read until a tensor is asked for.

`Checkpoint` gives transformers' loader a plain dict of names to `TensorRef`. The loader asks a ref for
its dtype and shape and then indexes it once; only that reads, by positional reads into fresh anonymous
memory. Files are never mapped: a mapped shard stays resident for as long as any tensor aliases it, and
then the peak of a load is the size of the checkpoint.

Format of safetensors: 8 bytes little-endian header length, a JSON header of name -> {dtype, shape, data_offsets}, data.
Source: https://github.com/huggingface/safetensors#format. Of `.bin` files: see `pickles`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from service.errors import CheckpointError
from service.loading.pickles import read_pickle
from service.loading.shards import PICKLE_SUFFIX, shard_paths

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Those of safetensors that torch has, by the names that they have there."""
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library
_READ_BYTES = 16 * 2**20  # one system call; progress advances at this grain


class TensorHeader(Protocol):
    """What a header says of a tensor."""

    @property
    def name(self) -> str:
        """In the checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""


@dataclass(slots=True)
class ReadMeter:
    """Bytes and seconds spent reading tensor data; `on_bytes` is called after each read."""

    on_bytes: Callable[[int], None]
    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """Count one read."""
        self.num_bytes += num_bytes
        self.seconds += seconds
        self.on_bytes(num_bytes)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of a shard, unread. It has the members that transformers' loader asks for.

    Attributes:
        path, fd: the shard, open for reading.
        begin, end: byte range of the tensor in the file, half open.
        tag: safetensors dtype, such as "BF16".
        shape: sizes.
        strides: of the elements in the byte range; () if they lie in order.
    """

    name: str
    path: Path
    fd: int
    begin: int
    end: int
    tag: str
    shape: tuple[int, ...]
    meter: ReadMeter
    strides: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return DTYPES[self.tag]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.end - self.begin

    def get_dtype(self) -> str:
        """The safetensors dtype tag."""
        return self.tag

    def get_shape(self) -> list[int]:
        """Sizes as a list."""
        return list(self.shape)

    def is_floating_point(self) -> bool:
        """Whether the values are floating point."""
        return self.dtype.is_floating_point

    def read(self) -> Tensor:
        """The tensor in fresh memory, dtype and shape as in the file.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy().data)
        done = 0
        while done < self.num_bytes:
            started = time.monotonic()
            try:
                count = os.preadv(self.fd, [view[done : done + _READ_BYTES]], self.begin + done)
            except OSError as error:
                raise CheckpointError(f"{self.path.name}: tensor {self.name!r} cannot be read: {error}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path.name} ends at byte {self.begin + done}, tensor {self.name!r} needs bytes up to "
                    f"{self.end}; download the file again"
                )
            done += count
            self.meter.add(count, time.monotonic() - started)
        elements = buffer.view(self.dtype)
        return elements.as_strided(self.shape, self.strides).contiguous() if self.strides else elements.view(self.shape)

    def same_bytes(self, other: TensorRef) -> bool:
        """Whether another tensor has the same dtype, shape, order and contents, compared piece by piece."""
        if (self.tag, self.shape, self.strides) != (other.tag, other.shape, other.strides):
            return False
        pieces = range(0, self.num_bytes, _READ_BYTES)
        return all(self._piece(start) == other._piece(start) for start in pieces)

    def _piece(self, start: int) -> bytes:
        return os.pread(self.fd, min(_READ_BYTES, self.num_bytes - start), self.begin + start)

    def __getitem__(self, selection: EllipsisType | slice | tuple[slice, ...]) -> Tensor:
        """Read the tensor and apply a selection; the loader passes an ellipsis."""
        tensor = self.read()
        return tensor if selection is Ellipsis else tensor[selection]


class Checkpoint:
    """All tensors of a model folder, unread; a context manager that holds the shards open.

    Attributes:
        refs: checkpoint name to `TensorRef`.
        meter: what was read so far.
    """

    def __init__(self, folder: Path, on_bytes: Callable[[int], None]) -> None:
        self.meter = ReadMeter(on_bytes)
        self.refs: dict[str, TensorRef] = {}
        self._fds: list[int] = []
        try:
            for path in shard_paths(folder):
                self._add_shard(path)
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.num_bytes for ref in self.refs.values())

    def close(self) -> None:
        """Close the shards; refs can no longer be read."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_shard(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(fd)
        for ref in self._pickled(path, fd) if path.suffix == PICKLE_SUFFIX else self._tensors(path, fd):
            if ref.name in self.refs:
                raise CheckpointError(
                    f"tensor {ref.name!r} is in both {self.refs[ref.name].path.name} and {path.name}; "
                    "a name may appear once"
                )
            self.refs[ref.name] = ref

    def _tensors(self, path: Path, fd: int) -> Iterator[TensorRef]:
        for name, tag, shape, begin, end in read_header(path, fd):
            yield TensorRef(name, path, fd, begin, end, tag, shape, self.meter)

    def _pickled(self, path: Path, fd: int) -> Iterator[TensorRef]:
        for name, dtype, shape, begin, end, strides in read_pickle(path):
            if dtype not in _TAGS:
                raise CheckpointError(f"{path.name}: tensor {name!r} is of {dtype}; real numbers are read only")
            yield TensorRef(name, path, fd, begin, end, _TAGS[dtype], shape, self.meter, strides)


def read_header(path: Path, fd: int) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Name, dtype tag, shape and absolute byte range of every tensor of an open safetensors file.

    Raises:
        CheckpointError: the header is damaged, or a range is outside of the file, overlaps another, or
            does not fit its shape.
    """
    file_bytes = os.fstat(fd).st_size
    header_bytes = int.from_bytes(os.pread(fd, 8, 0), "little")
    if file_bytes < 8 or not 2 <= header_bytes <= min(file_bytes - 8, _MAX_HEADER_BYTES):
        raise _damaged(path, f"a header of {header_bytes} bytes in a file of {file_bytes}")
    try:
        header = json.loads(os.pread(fd, header_bytes, 8))
        header.pop("__metadata__", None)
        rows = [_entry(name, entry) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header does not parse ({type(error).__name__})") from error
    data_start, position = 8 + header_bytes, 0
    for name, tag, shape, begin, end in sorted(rows, key=lambda row: row[3:]):
        expected = math.prod(shape) * DTYPES[tag].itemsize
        if begin != position or end - begin != expected:
            raise _damaged(
                path, f"tensor {name!r} of {expected} bytes has range {begin}..{end}, expected at {position}"
            )
        position = end
    if data_start + position != file_bytes:
        raise _damaged(path, f"its tensors end at byte {data_start + position}, the file at {file_bytes}")
    return [(name, tag, shape, data_start + begin, data_start + end) for name, tag, shape, begin, end in rows]


def _entry(name: str, entry: dict[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    tag, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if tag not in DTYPES:
        raise ValueError(f"dtype {tag!r} of tensor {name!r}")
    if not all(isinstance(size, int) and size >= 0 for size in (*shape, begin, end)):
        raise ValueError(f"sizes of tensor {name!r}")
    return name, tag, shape, begin, end


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is not a whole safetensors file: {what}; download the file again")
