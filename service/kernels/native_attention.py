"""Native attention of single tokens to keys and values in blocks, which it reads where they lie."""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

import torch
from torch import Tensor

from service.kernels.native import Library

_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}  # enum pw_dtype
_BLOCK_MULTIPLE: Final = 16
_task_bytes = Struct("18q2d").pack  # `pw_attention` of native/kernels.h


class Stored(NamedTuple):
    """Keys or values of one layer as they are stored, contiguous.

    Attributes:
        rows: [blocks, block_size, kv_heads, size], of the activations' dtype, or int8.
        scales: bfloat16[blocks, block_size, kv_heads, 1], which int8 rows are multiplied with; else None.
    """

    rows: Tensor
    scales: Tensor | None = None


class Attention(NamedTuple):
    """How scores become weights.

    Attributes:
        scaling: factor of the scores.
        sliding_window: how many of the last tokens are seen, at least 1; None for all.
        softcap: c in `c * tanh(score / c)`; None for no cap.
        sinks: float[heads], scores of a token without a value; None for no such token.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def takes(queries: Tensor, keys: Stored, values: Stored) -> bool:
    """Whether the library attends such queries [rows, heads, size] to such blocks."""
    return (
        queries.is_cpu
        and queries.dtype in _DTYPES
        and all(
            (torch.int8 if stored.scales is not None else queries.dtype) is stored.rows.dtype
            for stored in (keys, values)
        )
        and keys.rows.shape[1] % _BLOCK_MULTIPLE == 0
    )


def attend(
    library: Library, queries: Tensor, keys: Stored, values: Stored, *, tables: Tensor, lengths: Tensor, how: Attention
) -> Tensor:
    """Attend queries [rows, heads, size], as `takes` has them, one per sequence.

    Args:
        tables: int64[rows, n], blocks of each sequence in order, contiguous.
        lengths: int64[rows], tokens of each sequence, of which the query's own is the last.

    Returns:
        [rows, heads, value size] of the queries' dtype; NaN where queries, keys, values or sinks have it, and infinity
        counts as in a softmax.
    """
    queries = queries.contiguous()
    num_rows, num_heads, key_size = queries.shape
    block_size, num_kv_heads, value_size = values.rows.shape[1:]
    out = queries.new_empty((num_rows, num_heads, value_size))
    sinks = None if how.sinks is None else how.sinks.float().contiguous()
    task = _task_bytes(
        queries.data_ptr(),
        keys.rows.data_ptr(),
        values.rows.data_ptr(),
        *(0 if stored.scales is None else stored.scales.data_ptr() for stored in (keys, values)),
        tables.data_ptr(),
        lengths.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        num_rows,
        num_heads,
        num_kv_heads,
        key_size,
        value_size,
        block_size,
        tables.shape[1],
        how.sliding_window or 0,
        _DTYPES[queries.dtype],
        how.scaling,
        how.softcap or 0.0,
    )
    num_tokens = tables.shape[1] * block_size
    if how.sliding_window is not None:
        num_tokens = min(num_tokens, how.sliding_window)
    num_bytes = num_rows * num_tokens * num_kv_heads * (key_size + value_size) * keys.rows.itemsize
    library.run("pw_attend", task, num_bytes)
    return out
