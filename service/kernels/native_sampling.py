"""Native choice of tokens: peaks, draws and log-probabilities of rows of logits.

What a row gives depends on its own logits, parameters and uniform number only: on no neighbour and no number of
threads. It is the same for all instruction sets but the baseline, whose weights differ by up to 2^-22 of themselves.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import Struct
from typing import Final, NamedTuple

import torch
from torch import Tensor

from service.kernels.native import Library

MAX_LOGPROBS: Final = 256
"""Of the likeliest tokens of a row; the time that their order takes rises with the square of their number."""

_MAX_SIZE: Final = 1 << 20  # of rows and vocabularies
_NUM_READS: Final = 8  # of its logits in whose time a row is drawn
_PEAKS, _DRAWS, _LOGPROBS = (Struct(code).pack for code in ("5q", "6q", "8q"))  # of native/kernels.h, as below
_draw_bytes = Struct("2q4d").pack  # `pw_draw`


class Peaks(NamedTuple):
    """Of each row: the largest logit, which is NaN if any is, and the first token that has it."""

    logits: list[float]
    tokens: list[int]


class Draw(NamedTuple):
    """A token to be drawn: `pw_draw` of native/kernels.h.

    Attributes:
        row: of the logits.
        inverse_temperature: above 0, also as float32, and finite.
        uniform: in [0, 1).
    """

    row: int
    top_k: int
    inverse_temperature: float
    top_p: float
    min_p: float
    uniform: float


class Logprobs(NamedTuple):
    """Of each row: the log-probability of its token, ids of the likeliest, and theirs."""

    own: list[float]
    ids: list[list[int]]
    values: list[list[float]]


def takes(logits: Tensor) -> bool:
    """Whether these are rows of logits that the library reads: float32[rows, vocab], contiguous, on the CPU."""
    return (
        logits.dtype is torch.float32
        and logits.is_cpu
        and logits.dim() == 2
        and 0 < logits.shape[0] <= _MAX_SIZE
        and 0 < logits.shape[1] <= _MAX_SIZE
        and logits.is_contiguous()
    )


def find_peaks(library: Library, logits: Tensor) -> Peaks:
    """Read all of the logits once, as `takes` has them."""
    num_rows, vocab_size = logits.shape
    tokens, peaks = _integers(num_rows), array("f", bytes(4 * num_rows))
    task = _PEAKS(logits.data_ptr(), num_rows, vocab_size, _at(tokens), _at(peaks))
    library.run("pw_find_peaks", task, logits.nbytes)
    return Peaks(peaks.tolist(), tokens.tolist())


def draw(library: Library, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draw tokens from rows of logits, as `takes` has them, with finite peaks."""
    num_rows, vocab_size = logits.shape
    tokens, packed = _integers(len(draws)), array("b", b"".join(_draw_bytes(*each) for each in draws))
    task = _DRAWS(logits.data_ptr(), num_rows, vocab_size, _at(packed), len(draws), _at(tokens))
    library.run("pw_draw_tokens", task, _NUM_READS * len(draws) * vocab_size * logits.itemsize)
    return tokens.tolist()


def read_logprobs(library: Library, logits: Tensor, tokens: Sequence[int], count: int) -> Logprobs:
    """Read the log-probabilities of a token of each row, and the likeliest `count`, up to `MAX_LOGPROBS` and vocab."""
    num_rows, vocab_size = logits.shape
    chosen, own = array("q", tokens), _floats(num_rows)
    ids, values = _integers(num_rows * count), _floats(num_rows * count)
    task = _LOGPROBS(logits.data_ptr(), num_rows, vocab_size, _at(chosen), count, _at(own), _at(ids), _at(values))
    library.run("pw_read_logprobs", task, _NUM_READS * logits.nbytes)
    starts = range(0, num_rows * count, count) if count else [0] * num_rows
    return Logprobs(
        own.tolist(),
        [ids[start : start + count].tolist() for start in starts],
        [values[start : start + count].tolist() for start in starts],
    )


def _integers(size: int) -> array[int]:
    return array("q", bytes(8 * size))


def _floats(size: int) -> array[float]:
    return array("d", bytes(8 * size))


def _at(values: array[int] | array[float]) -> int:
    return values.buffer_info()[0]
