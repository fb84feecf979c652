"""Native attention of single tokens and parts of prompts, which reads keys and values where they lie in blocks."""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

import torch
from torch import Tensor

from service.kernels.native import Library

_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}  # enum pw_dtype
_BLOCK_MULTIPLE: Final = 16
_HEADS_OF_ONE_READ: Final = 16  # query heads that cost no more than reading keys and values does
_task_bytes = Struct("19q2d").pack  # `pw_attention` of native/kernels.h


class Stored(NamedTuple):
    """Keys or values of one layer as they are stored, contiguous.

    Attributes:
        rows: [blocks, block_size, kv_heads, size], of the activations' dtype, or int8.
        scales: bfloat16[blocks, block_size, kv_heads, 1], which int8 rows are multiplied with; else None.
    """

    rows: Tensor
    scales: Tensor | None = None


class Rows(NamedTuple):
    """Whose tokens attend to what: those of a row follow one another, the last of a sequence.

    Attributes:
        tables: int64[n], the blocks of each row's sequence in order, one row behind the other.
        table_starts: int64[rows + 1], where in `tables` each row begins, and the end of the last.
        lengths: int64[rows], tokens of each sequence, those that attend included.
        counts: int64[rows], how many of them attend.
    """

    tables: Tensor
    table_starts: Tensor
    lengths: Tensor
    counts: Tensor


class Attention(NamedTuple):
    """How scores become weights.

    Attributes:
        scaling: factor of the scores.
        sliding_window: how many tokens up to its own one sees, at least 1; None for all.
        softcap: c in `c * tanh(score / c)`; None for no cap.
        sinks: float[heads], scores of a token without a value; None for no such token.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def takes(queries: Tensor, keys: Stored, values: Stored) -> bool:
    """Whether the library attends such queries [tokens, heads, size] to such blocks."""
    return (
        queries.is_cpu
        and queries.dtype in _DTYPES
        and all(
            (torch.int8 if stored.scales is not None else queries.dtype) is stored.rows.dtype
            for stored in (keys, values)
        )
        and keys.rows.shape[1] % _BLOCK_MULTIPLE == 0
    )


def attend(library: Library, queries: Tensor, keys: Stored, values: Stored, rows: Rows, *, how: Attention) -> Tensor:
    """Attend queries [tokens, heads, size], as `takes` has them, of all rows in order.

    Returns:
        [tokens, heads, value size] of the queries' dtype; NaN where queries, keys, values or sinks have it, and
        infinity counts as in a softmax.
    """
    queries = queries.contiguous()
    num_tokens, num_heads, key_size = queries.shape
    block_size, num_kv_heads, value_size = values.rows.shape[1:]
    num_rows = len(rows.lengths)
    out = queries.new_empty((num_tokens, num_heads, value_size))
    sinks = None if how.sinks is None else how.sinks.float().contiguous()
    task = _task_bytes(
        queries.data_ptr(),
        keys.rows.data_ptr(),
        values.rows.data_ptr(),
        *(0 if stored.scales is None else stored.scales.data_ptr() for stored in (keys, values)),
        *(integers.data_ptr() for integers in rows),
        0 if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        num_rows,
        num_heads,
        num_kv_heads,
        key_size,
        value_size,
        block_size,
        how.sliding_window or 0,
        _DTYPES[queries.dtype],
        how.scaling,
        how.softcap or 0.0,
    )
    num_seen = len(rows.tables) * block_size
    if how.sliding_window is not None:
        num_seen = min(num_seen, num_rows * how.sliding_window)
    num_reads = 1 + num_tokens * num_heads // (num_rows * num_kv_heads * _HEADS_OF_ONE_READ)
    num_bytes = num_reads * num_seen * num_kv_heads * (key_size + value_size) * keys.rows.itemsize
    library.run("pw_attend", task, num_bytes)
    return out
