"""Checkpoints as a lazy state dict: nothing is read until a tensor is asked for.

`Checkpoint` gives transformers' loader a plain dict of names to `TensorRef`. The loader asks a ref for
its dtype and shape, indexes it and casts it once; only that reads.

Format of safetensors: 8 bytes little-endian header length, a JSON header of name -> {dtype, shape, data_offsets}, data.
Source: https://github.com/huggingface/safetensors#format. Of `.bin` files: see `pickles`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from service.errors import CheckpointError
from service.loading.pickles import read_pickle
from service.loading.shards import PICKLE_SUFFIX, shard_paths
from service.loading.tensors import DTYPES, ReadMeter, TensorRef

_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library


class Checkpoint:
    """All tensors of a model folder, unread; a context manager that holds the shards open.

    Attributes:
        refs: checkpoint name to `TensorRef`.
        meter: what was read so far.
    """

    def __init__(self, folder: Path, on_bytes: Callable[[int], None]) -> None:
        """Open the shards and read their headers.

        Raises:
            ModelNotFound: there are no shards.
            CheckpointError: one is missing, damaged or cannot be read.
        """
        self.meter = ReadMeter(on_bytes)
        self.refs: dict[str, TensorRef] = {}
        self._fds: list[int] = []
        try:
            for path in shard_paths(folder):
                self._open_shard(path)
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

    def _open_shard(self, path: Path) -> None:
        try:
            self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            self._add_shard(path, self._fds[-1])
        except OSError as error:
            raise CheckpointError(
                f"{path.name} cannot be read ({error.strerror}); make it readable, or download it again"
            ) from error

    def _add_shard(self, path: Path, fd: int) -> None:
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
