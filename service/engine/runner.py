"""What the engine asks of a model, and the packed path: one row holds the tokens of all sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from service.engine.attention import STEP_KEYWORD, Chunk, Decodes, Span, Step, install
from service.engine.batch import Work
from service.engine.blocks import Capacity, KVBlocks, plan_capacity
from service.engine.config import KVFormat
from service.engine.filters import first_position
from service.engine.stats import EnginePath

_PADDING_SLACK_BLOCKS = 16
"""Sequences whose lengths differ by no more are attended in one batch: another one costs more than the padding."""


class ModelRunner(Protocol):
    """How an engine computes its model. Owned by the engine thread; `num_bytes` may be read from any.

    Attributes:
        path: in which way it computes.
        chunked: whether the tokens of a prompt may be spread over several steps.
    """

    path: EnginePath
    chunked: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and states: sums over tensors."""

    def allocate(
        self, kv_memory_bytes: int, *, max_num_seqs: int, max_model_len: int, kv_cache: KVFormat = "auto"
    ) -> Capacity:
        """Say what the memory holds, and take what is taken in advance.

        Raises:
            SettingError: the memory holds no block, or this way of computing stores no `kv_cache` of that format.
        """

    def forward(self, works: Sequence[Work]) -> Tensor:
        """Compute each work's tokens and keep what the next ones need.

        Returns:
            Logits float32[rows, vocab] behind the last `num_logits` tokens of each work, in order.
        """

    def make_deterministic(self) -> None:
        """From now on let a forward of one sequence depend on nothing but its tokens and positions, in every bit."""

    def resume_position(self, work: Work) -> int | None:
        """From where on a work is computed in smaller pieces after it has failed; None if it cannot be."""

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence that has ended, or that will be computed again."""


class Runner:
    """The packed path: a model with its KV blocks. A `ModelRunner`.

    The first forward tells what a token costs in the KV blocks, so it comes before `allocate`.

    Raises:
        UnsupportedModel: the model takes no attention function.
    """

    path = EnginePath.PACKED
    chunked = True

    def __init__(self, model: nn.Module) -> None:
        install(model)
        self._model = model
        self._device = next(model.parameters()).device
        self._first_position = first_position(model)
        self._reads_in_place = True
        self.kv = KVBlocks()

    @property
    def num_bytes(self) -> int:
        """See `ModelRunner`."""
        return self.kv.num_bytes

    @torch.inference_mode()
    def allocate(
        self, kv_memory_bytes: int, *, max_num_seqs: int, max_model_len: int, kv_cache: KVFormat = "auto"
    ) -> Capacity:
        """See `ModelRunner`; the blocks are made here, and what was stored before is dropped.

        The format changes only here: the probe comes before and compares with keys and values as they are,
        because int8 is further from the model's own forward than the probe tolerates.
        """
        self.kv.set_format(kv_cache)
        capacity = plan_capacity(
            kv_memory_bytes,
            token_bytes=self.kv.bytes_per_token,
            state_bytes=0,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        self.kv.resize(capacity.num_blocks)
        return capacity

    @torch.inference_mode()
    def forward(self, works: Sequence[Work]) -> Tensor:
        """See `ModelRunner`; all works are one row of tokens."""
        # Decodes first and by length, so that those of similar length lie next to each other.
        order = sorted(range(len(works)), key=lambda i: (works[i].count > 1, works[i].position))
        ordered = [works[i] for i in order]
        columns = torch.tensor(_columns(ordered, self.kv.block_size), device=self._device)
        ids, positions, slots = columns.unbind()
        stops = [0] * len(works)
        stop = 0
        for i in order:
            stop += works[i].count
            stops[i] = stop
        tails = [tail for work, stop in zip(works, stops, strict=True) for tail in range(stop - work.num_logits, stop)]
        step = Step(self.kv, slots, self._fresh_blocks(ordered), list(self._spans(ordered)))
        return self._call(ids[None], positions[None], torch.tensor(tails, device=self._device), step)

    def make_deterministic(self) -> None:
        """See `ModelRunner`; keys that are read in place lie now in a row, now apart, and differently aligned."""
        self._reads_in_place = False

    def resume_position(self, work: Work) -> int:
        """See `ModelRunner`; slots are written again with the same."""
        return work.position

    def forget(self, request_id: str) -> None:
        """See `ModelRunner`; the blocks belong to the scheduler, and nothing else is kept."""

    def _call(self, ids: Tensor, positions: Tensor, tails: Tensor, step: Step) -> Tensor:
        output = self._model(
            input_ids=ids,
            position_ids=positions + self._first_position if self._first_position else positions,
            use_cache=False,
            logits_to_keep=tails,
            **{STEP_KEYWORD: step},
        )
        logits: Tensor = output.logits[0]
        if logits.shape[0] != tails.shape[0]:  # the model ignores `logits_to_keep` and returns every column
            logits = logits[tails]
        return logits.float()

    def _fresh_blocks(self, works: Iterable[Work]) -> Tensor | None:
        """Blocks that a work begins and does not fill."""
        size = self.kv.block_size
        fresh = []
        for work in works:
            index, filled = divmod(work.position + work.count, size)
            if filled and index * size >= work.position:
                fresh.append(work.sequence.block_table[index])
        return torch.tensor(fresh, device=self._device) if fresh else None

    def _spans(self, works: Sequence[Work]) -> Iterator[Span]:
        """Split columns into batches of decodes of similar length and single chunks."""
        start = 0
        while works:
            num_rows = _num_similar_decodes(works, self.kv.block_size)
            group, works = works[: max(1, num_rows)], works[max(1, num_rows) :]
            stop = start + sum(work.count for work in group)
            yield self._decodes(start, stop, group) if num_rows > 1 else self._chunk(start, stop, group[0])
            start = stop

    def _decodes(self, start: int, stop: int, works: Sequence[Work]) -> Decodes:
        lengths = [work.position + 1 for work in works]
        width = _num_blocks(max(lengths), self.kv.block_size)
        tables = []
        for work, length in zip(works, lengths, strict=True):
            table = work.sequence.block_table
            num_blocks = _num_blocks(length, self.kv.block_size)
            tables.append(table[:num_blocks] + table[:1] * (width - num_blocks))
        return Decodes(
            start,
            stop,
            lengths=torch.tensor(lengths, device=self._device),
            block_tables=torch.tensor(tables, device=self._device),
        )

    def _chunk(self, start: int, stop: int, work: Work) -> Chunk:
        num_blocks = _num_blocks(work.position + work.count, self.kv.block_size)
        table = work.sequence.block_table[:num_blocks]
        is_run = table[-1] - table[0] == num_blocks - 1 and all(b == table[0] + i for i, b in enumerate(table))
        return Chunk(
            start,
            stop,
            position=work.position,
            first_slot=table[0] * self.kv.block_size if is_run and self._reads_in_place else None,
            block_table=torch.tensor([table], device=self._device),
        )


def _columns(works: Iterable[Work], block_size: int) -> list[list[int]]:
    """Token ids, positions and slots of the row."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for work in works:
        span = range(work.position, work.position + work.count)
        table = work.sequence.block_table
        ids += work.sequence.token_ids[span.start : span.stop]
        positions += span
        slots += [table[position // block_size] * block_size + position % block_size for position in span]
    return [ids, positions, slots]


def _num_similar_decodes(works: Sequence[Work], block_size: int) -> int:
    """How many leading works are decodes that one batch can hold without padding any of them much."""
    shortest = _num_blocks(works[0].position + 1, block_size)
    limit = max(2 * shortest, shortest + _PADDING_SLACK_BLOCKS)
    num_rows = 0
    for work in works:
        if work.count > 1 or _num_blocks(work.position + 1, block_size) > limit:
            break
        num_rows += 1
    return num_rows


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
