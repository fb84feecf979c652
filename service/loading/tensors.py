"""Tensors of a checkpoint, unread, and the reading of them: by position, in pieces, one ahead of its use.

Files are never mapped: a mapped shard stays resident for as long as any tensor aliases it, and then the peak of a
load is the size of the checkpoint.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Final, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from service.errors import CheckpointError

DTYPES: Final = {
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
PIECE_BYTES: Final = 16 * 2**20
"""Of a tensor that is read at a time; two such pieces are in memory, one in use and one being read."""
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

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the elements in the file; () if they lie in order."""


@dataclass(slots=True)
class ReadMeter:
    """Bytes read of tensor data, and seconds that a load waited for them; `on_bytes` is called after each read."""

    on_bytes: Callable[[int], None]
    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, num_bytes: int) -> None:
        """Count one read."""
        self.num_bytes += num_bytes
        self.on_bytes(num_bytes)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within as waited."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of a shard, unread. It has the members that transformers' loader asks for.

    The loader takes `ref[...]` for the tensor, and then casts it with `to`: that reads, or leaves it unread for those
    who read it piece by piece.

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

    def __getitem__(self, selection: EllipsisType) -> Self:
        """The whole tensor, still unread."""
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor | TensorRef:
        """The tensor in another dtype, in fresh memory; without a dtype itself, still unread.

        It is cast piece by piece: never is there more of it in the dtype of the file than a few pieces.

        Args:
            device: the CPU, which the loader names.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        if dtype is None:
            return self
        if dtype == self.dtype:
            return self.read()
        if self.strides:
            return self.read().to(dtype)
        cast = torch.empty(self.shape, dtype=dtype)
        flat, position = cast.view(-1), 0
        for data in read_ahead([ByteRange(self, *bounds)] for bounds in self._pieces()):
            values = data.view(self.dtype)
            flat[position : position + len(values)] = values
            position += len(values)
        return cast

    def read(self) -> Tensor:
        """The tensor in fresh memory, dtype and shape as in the file.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        with self.meter.waiting():
            self.read_into(buffer, 0)
        elements = buffer.view(self.dtype)
        return elements.as_strided(self.shape, self.strides).contiguous() if self.strides else elements.view(self.shape)

    def read_into(self, buffer: Tensor, start: int) -> None:
        """Read as many bytes as a buffer has, from one of the tensor on.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        view = memoryview(buffer.numpy().data)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, [view[done : done + _READ_BYTES]], self.begin + start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path.name}: tensor {self.name!r} cannot be read: {error}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path.name} ends at byte {self.begin + start + done}, tensor {self.name!r} needs bytes up "
                    f"to {self.end}; download the file again"
                )
            done += count
            self.meter.add(count)

    def same_bytes(self, other: TensorRef) -> bool:
        """Whether another tensor has the same dtype, shape, order and contents, compared piece by piece."""
        if (self.tag, self.shape, self.strides) != (other.tag, other.shape, other.strides):
            return False
        return all(self._piece(*bounds) == other._piece(*bounds) for bounds in self._pieces())

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Bounds in bytes of the pieces of the tensor."""
        for start in range(0, self.num_bytes, PIECE_BYTES):
            yield start, min(start + PIECE_BYTES, self.num_bytes)

    def _piece(self, start: int, stop: int) -> bytes:
        return os.pread(self.fd, stop - start, self.begin + start)


class ByteRange(NamedTuple):
    """Bytes of a tensor, half open, counted from its first."""

    ref: TensorRef
    start: int
    stop: int


Piece = list[ByteRange]
"""What is read into one buffer, one range after another."""


def read_ahead(pieces: Iterable[Piece]) -> Iterator[Tensor]:
    """Bytes uint8[n] of each piece, in order; while one is in use, a thread reads the next.

    They are overwritten later: what is given may be used only until the next is asked for. While a piece of more than
    `PIECE_BYTES` is in use, nothing is read.

    Raises:
        CheckpointError: a file ends early or cannot be read.
    """
    rooms = [_Room(), _Room()]
    large_room = _Room()
    pending: deque[_Pending] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        for number, piece in enumerate(pieces):
            num_bytes = sum(stop - start for _, start, stop in piece)
            is_large = num_bytes > PIECE_BYTES
            while pending and is_large:
                yield pending.popleft().wait()
            buffer = (large_room if is_large else rooms[number % 2]).take(num_bytes)
            pending.append(_Pending(reader.submit(_read, piece, buffer), piece[0].ref.meter))
            while len(pending) > (0 if is_large else 1):
                yield pending.popleft().wait()
        while pending:
            yield pending.popleft().wait()


class _Room:
    """Memory for one piece after another: pages that are new each time would take as long as the reading."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        if len(self._bytes) < num_bytes:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # goes before its successor comes
            self._bytes = torch.empty(max(num_bytes, PIECE_BYTES), dtype=torch.uint8)
        return self._bytes[:num_bytes]


class _Pending(NamedTuple):
    """A piece that is being read."""

    future: Future[Tensor]
    meter: ReadMeter

    def wait(self) -> Tensor:
        with self.meter.waiting():
            return self.future.result()


def _read(piece: Piece, buffer: Tensor) -> Tensor:
    position = 0
    for ref, start, stop in piece:
        ref.read_into(buffer[position : position + stop - start], start)
        position += stop - start
    return buffer
