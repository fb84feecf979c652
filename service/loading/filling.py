"""From weights to the buffers of quantized layers.

Weights that lie in the file as they are quantized are taken last, all of them in the order of the files, in runs of
rows or expert by expert: while one run is encoded, a thread reads the next. Others are encoded as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from service.errors import CheckpointError, PennyweightError
from service.kernels.dispatch import encode
from service.layers.experts import QuantizedExperts
from service.layers.replace import QuantizedLayer, Slot
from service.loading.record import EncodedLayer, LoadRecord, UnreadExperts
from service.loading.tensors import PIECE_BYTES, ByteRange, Piece, TensorRef, read_ahead
from service.numerics.encode import EncodedWeight
from service.numerics.packing import STRIP, num_strips

_TURNED_BYTES = 4 * 2**20
"""Of a weight that is stored the other way round: so much is put in order at a time, for encoders that need it so."""


def fill(record: LoadRecord, layer_name: str, weight: Tensor) -> None:
    """Encode a weight that is in memory.

    Raises:
        CheckpointError: its shape is not that of the model.
        QuantizationError: it holds NaN or infinity.
    """
    slot, layer = record.layers[layer_name]
    require_shape(slot, tuple(weight.shape))
    for index, matrix in enumerate(weight if slot.num_experts else [weight]):
        _encode(record, slot, layer, matrix, first=index)


def fill_unread(record: LoadRecord, *, piece_bytes: int = PIECE_BYTES) -> None:
    """Read and encode the weights that are still unread.

    Args:
        piece_bytes: about how much is read at a time; at least a strip of rows, or an expert.

    Raises:
        CheckpointError: a file ends early or cannot be read.
        QuantizationError: a weight holds NaN or infinity.
    """
    sources = sorted(record.unread.items(), key=lambda item: _file_position(item[1]))
    runs = [run for name, source in sources for run in _runs(*record.layers[name], source, piece_bytes)]
    record.unread.clear()
    for run, data in zip(runs, read_ahead(run.piece for run in runs), strict=True):
        matrix = data.view(run.piece[0].ref.dtype).view(run.shape)
        _encode(record, run.slot, run.layer, matrix, first=run.first)


def require_shape(slot: Slot, shape: tuple[int, ...]) -> None:
    """Check that a weight has the shape that the model has for it.

    Raises:
        CheckpointError: it has another one.
    """
    if shape != slot.stored_shape:
        raise CheckpointError(
            f"{slot.parameter} has shape {list(shape)} in the checkpoint, the config asks for "
            f"{list(slot.stored_shape)}; config and weights belong to different models"
        )


class _Run(NamedTuple):
    """What is read and encoded in one go.

    Attributes:
        shape: of the matrix, as it is stored.
        first: row of the weight that it begins with, or the number of the expert.
    """

    slot: Slot
    layer: QuantizedLayer
    piece: Piece
    shape: tuple[int, int]
    first: int


def _runs(slot: Slot, layer: QuantizedLayer, source: TensorRef | UnreadExperts, piece_bytes: int) -> Iterator[_Run]:
    rows, columns = slot.stored_shape[-2:]
    if isinstance(source, UnreadExperts):
        for index, refs in enumerate(source.experts):
            yield _Run(slot, layer, [ByteRange(ref, 0, ref.num_bytes) for ref in refs], (rows, columns), index)
        return
    row_bytes = max(1, columns * source.dtype.itemsize)
    if slot.num_experts:
        for index in range(slot.num_experts):
            start = index * rows * row_bytes
            yield _Run(slot, layer, [ByteRange(source, start, start + rows * row_bytes)], (rows, columns), index)
        return
    # Rows of a weight that is stored the other way round are columns of what is encoded.
    is_whole = slot.is_transposed or not slot.scheme.is_row_local
    num_rows = rows if is_whole else max(STRIP, piece_bytes // row_bytes // STRIP * STRIP)
    for first in range(0, rows, num_rows):
        last = min(first + num_rows, rows)
        yield _Run(
            slot, layer, [ByteRange(source, first * row_bytes, last * row_bytes)], (last - first, columns), first
        )


def _file_position(source: TensorRef | UnreadExperts) -> tuple[str, int]:
    ref = source.experts[0][0] if isinstance(source, UnreadExperts) else source
    return str(ref.path), ref.begin


def _encode(record: LoadRecord, slot: Slot, layer: QuantizedLayer, stored: Tensor, *, first: int) -> None:
    """Encode a matrix as it is stored into its place, and add up what that cost."""
    matrix = stored.t() if slot.is_transposed else stored
    into = layer.expert_buffers(first) if isinstance(layer, QuantizedExperts) else layer.row_buffers(first, len(matrix))
    num_rows = len(matrix)
    if slot.is_transposed and slot.scheme.is_row_local:
        row_bytes = max(1, matrix.shape[1] * matrix.itemsize)
        num_rows = max(STRIP, _TURNED_BYTES // row_bytes // STRIP * STRIP)
    for begin in range(0, len(matrix), num_rows):
        rows = matrix[begin : begin + num_rows].contiguous()
        try:
            encoded = encode(rows, slot.scheme, into=into.strips(begin // STRIP, num_strips(begin + len(rows))))
        except PennyweightError as error:
            raise type(error)(f"{slot.parameter}: {error}") from error
        _note(record, slot, rows, encoded)


def _note(record: LoadRecord, slot: Slot, rows: Tensor, encoded: EncodedWeight) -> None:
    record.quantize_s += encoded.quantize_s
    record.pack_s += encoded.pack_s
    before = record.encoded.get(slot.name, EncodedLayer(0.0, 0.0))
    record.encoded[slot.name] = EncodedLayer(before.signal + encoded.signal, before.noise + encoded.noise)
    if record.watch is not None:
        record.watch(slot, rows, encoded)
