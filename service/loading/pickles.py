"""Where the tensors of a `.bin` file lie, found without running what the file says.

A `.bin` file is a zip archive of one pickle, which says how tensors are made, and one uncompressed record of raw
bytes per storage. The pickle is read with torch's `weights_only` unpickler, which knows tensors and refuses all
else, under a mode in which tensors have no data but know their place in the file. The data is then read by position,
like that of safetensors files.

Private names of torch that are used here, each covered by a test: `FakeTensorMode`, `_checkpoint_offset`.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from service.errors import CheckpointError


class PickledTensor(NamedTuple):
    """A tensor of a `.bin` file, unread.

    Attributes:
        begin, end: byte range in the file from its first to its last element, half open.
        strides: in elements; () if the elements lie in order.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    strides: tuple[int, ...]


def read_pickle(path: Path) -> list[PickledTensor]:
    """All tensors of a `.bin` file.

    Raises:
        CheckpointError: the file is damaged, of an unknown layout, or holds anything but named tensors.
    """
    _check_archive(path)
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} holds more than tensors, which is refused and was not run: a pickle can hold any program; "
            "use a model in the safetensors format"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, f"torch cannot read it ({type(error).__name__})") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(
            f"{path.name} is not a state dict, it must hold nothing but tensors by name; use a model that "
            "save_pretrained() has written"
        )
    file_bytes = path.stat().st_size
    return [_place(path, name, tensor, file_bytes) for name, tensor in state.items()]


def _check_archive(path: Path) -> None:
    """Refuse what does not hold raw little-endian bytes; nothing is unpickled here."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path.name} is not a zip archive: it is damaged, or older than torch 1.6; download it again, or "
            "convert it to safetensors"
        )
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise _damaged(path, f"its record {record.filename} is compressed")
            if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                raise _damaged(path, "its numbers are not little-endian")


def _place(path: Path, name: str, tensor: Tensor, file_bytes: int) -> PickledTensor:
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if is_plain else None
    if not isinstance(offset, int):
        raise CheckpointError(
            f"{path.name}: tensor {name!r} is not a plain dense tensor, others cannot be read; use a model in the "
            "safetensors format"
        )
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    num_elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    extent = num_elements * tensor.itemsize if tensor.numel() else 0
    begin = offset + int(tensor.storage_offset()) * tensor.itemsize
    # Elements that share bytes would let a small file ask for any amount of memory.
    if begin + extent > file_bytes or tensor.numel() * tensor.itemsize > extent:
        raise _damaged(path, f"tensor {name!r} of shape {list(shape)} does not fit its {extent} bytes")
    return PickledTensor(name, tensor.dtype, shape, begin, begin + extent, () if tensor.is_contiguous() else strides)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is not a whole .bin file: {what}; download the file again")
