"""Reading of tensors: in pieces, in another dtype, one piece ahead; and what happens when a file ends early."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from service.errors import CheckpointError
from service.loading.checkpoint import Checkpoint
from service.loading.shards import PICKLE_SINGLE_NAME, SINGLE_NAME
from service.loading.tensors import PIECE_BYTES, ByteRange, TensorRef, read_ahead

ROWS, COLUMNS = 5, PIECE_BYTES // 8 + 3
"""A float32 matrix of two and a half pieces, the bounds of which lie inside of its rows."""


def ignore_bytes(_: int) -> None:
    """A progress callback for tests that do not look at it."""


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).sub_(ROWS * COLUMNS / 2).div_(7).view(ROWS, COLUMNS)


@pytest.fixture(scope="module")
def folder(weight: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensors")
    save_file({"weight": weight, "ids": torch.arange(9), "none": torch.empty(0, 3)}, folder / SINGLE_NAME)
    return folder


def test_a_tensor_without_a_dtype_to_have_stays_unread(folder: Path) -> None:
    with Checkpoint(folder, ignore_bytes) as checkpoint:
        ref = checkpoint.refs["weight"]
        assert ref[...].to(device="cpu") is ref
        assert checkpoint.meter.num_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_tensor_that_is_cast_piece_by_piece_is_cast_like_a_whole_one(
    dtype: torch.dtype, folder: Path, weight: Tensor
) -> None:
    with Checkpoint(folder, ignore_bytes) as checkpoint:
        cast = checkpoint.refs["weight"].to("cpu", dtype)
        assert isinstance(cast, Tensor)
        assert torch.equal(cast, weight.to(dtype))
        assert cast.dtype == dtype
        assert checkpoint.meter.num_bytes == weight.nbytes
        assert checkpoint.meter.seconds > 0
        empty = checkpoint.refs["none"].to("cpu", dtype)
        assert isinstance(empty, Tensor)
        assert (empty.shape, empty.dtype) == ((0, 3), dtype)


def test_elements_that_do_not_lie_in_order_are_cast_in_order(tmp_path: Path) -> None:
    values = torch.arange(12.0).view(3, 4)
    torch.save({"turned": values.t()}, tmp_path / PICKLE_SINGLE_NAME)
    with Checkpoint(tmp_path, ignore_bytes) as checkpoint:
        cast = checkpoint.refs["turned"].to("cpu", torch.bfloat16)
        assert isinstance(cast, Tensor)
        assert torch.equal(cast, values.t().bfloat16())


def ranges(ref: TensorRef, *bounds: tuple[int, int]) -> list[ByteRange]:
    return [ByteRange(ref, start, stop) for start, stop in bounds]


def test_pieces_come_in_order_whatever_their_sizes(folder: Path, weight: Tensor) -> None:
    raw = weight.view(-1).view(torch.uint8)
    large = PIECE_BYTES + 5
    bounds = [(0, 7), (7, 7), (3, large + 3), (1, large + 2), (0, PIECE_BYTES), (9, 12), (11, PIECE_BYTES), (5, 6)]
    with Checkpoint(folder, ignore_bytes) as checkpoint:
        ref = checkpoint.refs["weight"]
        pieces = [ranges(ref, *(each for each in [span, (2, 4)])) for span in bounds]
        for (start, stop), data in zip(bounds, read_ahead(pieces), strict=True):
            assert torch.equal(data, torch.cat([raw[start:stop], raw[2:4]]))


def test_while_a_piece_is_in_use_the_next_one_is_read_and_no_other(folder: Path) -> None:
    counted: list[int] = []
    changed = threading.Condition()

    def count(num_bytes: int) -> None:
        with changed:
            counted.append(num_bytes)
            changed.notify()

    with Checkpoint(folder, count) as checkpoint:
        ref = checkpoint.refs["weight"]
        reading = read_ahead([ranges(ref, (0, size)) for size in (101, 102, 103)])
        for expected in ([101, 102], [101, 102, 103], [101, 102, 103]):
            next(reading)
            with changed:
                while len(counted) < len(expected):
                    assert changed.wait(timeout=60)
            assert counted == expected


def test_while_a_large_piece_is_in_use_nothing_is_read(folder: Path) -> None:
    with Checkpoint(folder, ignore_bytes) as checkpoint:
        ref, meter = checkpoint.refs["weight"], checkpoint.meter
        sizes = [5, PIECE_BYTES + 1, 6]
        reading = read_ahead([ranges(ref, (0, size)) for size in sizes])
        next(reading)
        assert len(next(reading)) == sizes[1]
        assert meter.num_bytes == sum(sizes[:2])
        assert len(next(reading)) == sizes[2]
        with pytest.raises(StopIteration):
            next(reading)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_that_shrinks_while_it_is_read_is_named_with_the_tensor(
    dtype: torch.dtype, weight: Tensor, tmp_path: Path
) -> None:
    save_file({"weight": weight}, tmp_path / SINGLE_NAME)
    with Checkpoint(tmp_path, ignore_bytes) as checkpoint:
        ref = checkpoint.refs["weight"]
        with (tmp_path / SINGLE_NAME).open("r+b") as file:
            file.truncate(ref.end - 1)
        with pytest.raises(CheckpointError, match=f"{SINGLE_NAME} ends at byte {ref.end - 1}, tensor 'weight' needs"):
            ref.to("cpu", dtype)
