"""What a packed forward is given: the tokens of all sequences in one row, and where each one's keys and values lie."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from service.engine.attention import Chunk, Decodes, Span, Step
from service.engine.batch import Work
from service.engine.blocks import KVBlocks
from service.kernels.native_attention import Rows

_PADDING_SLACK_BLOCKS = 16
"""Sequences whose lengths differ by no more are attended in one batch: another one costs more than the padding."""
_AFTER_DECODES = 1 << 62
"""More than any position."""


class Inputs(NamedTuple):
    """One forward.

    Attributes:
        ids, positions: int64[T], each column's token and its place in its sequence.
        tails: int64[rows], columns behind which logits are wanted, in the order of the works.
        step: how the columns attend.
    """

    ids: Tensor
    positions: Tensor
    tails: Tensor
    step: Step


def pack(works: Sequence[Work], kv: KVBlocks, device: torch.device, *, reads_in_place: bool) -> Inputs:
    """Lay works end to end.

    Args:
        reads_in_place: read keys and values without a copy where the blocks of a sequence follow one another.
    """
    # Decodes first and by length, so that those of similar length lie next to each other.
    order = sorted(range(len(works)), key=lambda i: works[i].position + _AFTER_DECODES * (works[i].count > 1))
    ordered = [works[i] for i in order]
    groups = list(_groups(ordered, kv.block_size))
    integers = _Integers()
    for column in _columns(ordered, kv.block_size):
        integers.add(column)
    integers.add(_tails(works, order))
    integers.add(_fresh_blocks(ordered, kv.block_size))
    tables = [_tables(group, kv.block_size) for group in groups]
    for column in _rows(groups, tables):
        integers.add(column)
    ids, positions, slots, tails, fresh, *parts = integers.move(device)
    rows = Rows(*parts)

    def make_spans() -> list[Span]:
        first_slots = [_first_slot(group[0], kv.block_size) if reads_in_place else None for group in groups]
        return _spans(groups, tables, rows, first_slots)

    return Inputs(ids, positions, tails, Step(kv, slots, fresh if len(fresh) else None, rows, make_spans))


class _Integers:
    """Arrays that become tensors in one transfer: one for each would cost more than all of the rest."""

    def __init__(self) -> None:
        self._values = array("q")
        self._sizes: list[int] = []

    def add(self, values: array[int]) -> None:
        self._values += values
        self._sizes.append(len(values))

    def move(self, device: torch.device) -> Sequence[Tensor]:
        """One int64 tensor for each array, in order."""
        return torch.split(torch.frombuffer(self._values, dtype=torch.int64).to(device), self._sizes)


def _columns(works: Sequence[Work], block_size: int) -> tuple[array[int], array[int], array[int]]:
    """Token ids, positions and slots of the row."""
    ids, positions, slots = array("q"), array("q"), array("q")
    for work in works:
        table, first, stop = work.sequence.block_table, work.position, work.position + work.count
        if work.count == 1:
            ids.append(work.sequence.token_ids[first])
            positions.append(first)
            slots.append(table[first // block_size] * block_size + first % block_size)
        else:
            ids.extend(work.sequence.token_ids[first:stop])
            positions.extend(range(first, stop))
            slots.extend([table[place // block_size] * block_size + place % block_size for place in range(first, stop)])
    return ids, positions, slots


def _tails(works: Sequence[Work], order: Sequence[int]) -> array[int]:
    """The last `num_logits` columns of each work, in the order of the works."""
    stops = [0] * len(works)
    stop = 0
    for i in order:
        stop += works[i].count
        stops[i] = stop
    tails = array("q")
    for work, stop in zip(works, stops, strict=True):
        num_logits = work.num_logits
        if num_logits == 1:
            tails.append(stop - 1)
        else:
            tails.extend(range(stop - num_logits, stop))
    return tails


def _fresh_blocks(works: Sequence[Work], block_size: int) -> array[int]:
    """Blocks that a work begins and does not fill."""
    fresh = array("q")
    for work in works:
        index, filled = divmod(work.position + work.count, block_size)
        if filled and index * block_size >= work.position:
            fresh.append(work.sequence.block_table[index])
    return fresh


def _groups(works: Sequence[Work], block_size: int) -> Iterator[Sequence[Work]]:
    """Batches of decodes that can be padded to the longest of them at little cost, and single chunks."""
    group: list[Work] = []
    stop = 0  # position before which a decode belongs to the group
    for work in works:
        if group and (work.count > 1 or work.position >= stop):
            yield group
            group = []
        if not group:
            shortest = _num_blocks(work.position + 1, block_size)
            stop = 0 if work.count > 1 else max(2 * shortest, shortest + _PADDING_SLACK_BLOCKS) * block_size
        group.append(work)
    yield group


def _rows(groups: Sequence[Sequence[Work]], tables: Sequence[array[int]]) -> tuple[array[int], ...]:
    """The parts of `Rows`, the tables of the groups one behind the other."""
    joined, starts, lengths, counts = array("q"), array("q", [0]), array("q"), array("q")
    for group, table in zip(groups, tables, strict=True):
        joined += table
        width = len(table) // len(group)
        for work in group:
            starts.append(starts[-1] + width)
            lengths.append(work.position + work.count)
            counts.append(work.count)
    return joined, starts, lengths, counts


def _spans(
    groups: Sequence[Sequence[Work]], tables: Sequence[array[int]], rows: Rows, first_slots: Sequence[int | None]
) -> list[Span]:
    """One for each group."""
    spans: list[Span] = []
    start = first_row = begin = 0
    for group, table, first_slot in zip(groups, tables, first_slots, strict=True):
        stop, last_row, end = start + sum(work.count for work in group), first_row + len(group), begin + len(table)
        block_tables = rows.tables[begin:end].view(len(group), -1)
        if len(group) > 1:
            span: Span = Decodes(start, stop, lengths=rows.lengths[first_row:last_row], block_tables=block_tables)
        else:
            span = Chunk(start, stop, position=group[0].position, first_slot=first_slot, block_table=block_tables)
        spans.append(span)
        start, first_row, begin = stop, last_row, end
    return spans


def _tables(works: Sequence[Work], block_size: int) -> array[int]:
    """The blocks of each work's tokens so far; behind them its first block, until all have as many."""
    sizes = [(work.position + work.count - 1) // block_size + 1 for work in works]
    width = max(sizes)
    tables = array("q")
    for work, size in zip(works, sizes, strict=True):
        table = work.sequence.block_table
        tables += table[:size]
        if size < width:
            tables += table[:1] * (width - size)
    return tables


def _first_slot(work: Work, block_size: int) -> int | None:
    """The slot of a sequence's first token, if its blocks follow one another."""
    table = work.sequence.block_table[: _num_blocks(work.position + work.count, block_size)]
    first = table[0]
    is_run = table[-1] - first == len(table) - 1 and table == array("q", range(first, first + len(table)))
    return first * block_size if is_run else None


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
