"""Runs the model on one packed row of tokens and returns the logits behind each sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from service.engine.attention import STEP_KEYWORD, Chunk, Decodes, Span, Step, install
from service.engine.blocks import KVBlocks
from service.engine.scheduler import Work
from service.errors import SettingError, UnsupportedModel

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}

_PADDING_SLACK_BLOCKS = 16
"""Sequences whose lengths differ by no more are attended in one batch: another one costs more than the padding."""


def check_supported(model: nn.Module) -> None:
    """Refuse a model that a packed row would compute wrongly.

    Raises:
        UnsupportedModel: names the model type and the reason.
    """
    reason = _unsupported_reason(model)
    if reason is not None:
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UnsupportedModel(
            f"model type {model_type!r} cannot be served: {reason}; "
            "use a decoder-only model with full or sliding-window attention"
        )


def _unsupported_reason(model: nn.Module) -> str | None:
    if not getattr(model, "_supports_attention_backend", False):
        return "it has no exchangeable attention function"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state"
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if not getattr(config, "is_decoder", True) or not getattr(config, "is_causal", True):
        return "it attends in both directions"
    other_layers = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other_layers:
        return f"it has layers of type {', '.join(sorted(other_layers))}"
    length_dependent = _LENGTH_DEPENDENT_ROPE.intersection(_rope_types(getattr(config, "rope_parameters", None)))
    if length_dependent:
        return (
            f"its rotary embedding ({', '.join(sorted(length_dependent))}) depends on the longest sequence of a batch"
        )
    return None


def _rope_types(parameters: object) -> Iterator[str]:
    """Rope types of a config, which has one set of parameters or one for each layer type."""
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters["rope_type"]
        for nested in parameters.values():
            yield from _rope_types(nested)


class Runner:
    """A model with its KV blocks. Owned by the engine thread.

    A forward of one token tells what a token costs in the KV blocks; as many blocks as
    `kv_memory_bytes` hold are then allocated.

    Raises:
        UnsupportedModel: the model would be computed wrongly.
        SettingError: the memory holds no block.
    """

    def __init__(self, model: nn.Module, kv_memory_bytes: int) -> None:
        check_supported(model)
        install(model)
        self._model = model.eval()
        self._device = next(model.parameters()).device
        self.kv = KVBlocks()
        self._measure(kv_memory_bytes)

    @torch.inference_mode()
    def _measure(self, kv_memory_bytes: int) -> None:
        slots = torch.zeros(1, dtype=torch.int64, device=self._device)
        span = Chunk(0, 1, position=0, first_slot=0, block_table=slots[None])
        self._call(slots[None], slots[None], slots, Step(self.kv, slots, None, [span]))
        bytes_per_block = self.kv.bytes_per_token * self.kv.block_size
        num_blocks = kv_memory_bytes // bytes_per_block
        if num_blocks < 1:
            raise SettingError(
                f"KV memory of {kv_memory_bytes} bytes holds no block of {self.kv.block_size} tokens; "
                f"one takes {bytes_per_block} bytes; raise --kv-memory"
            )
        self.kv.resize(num_blocks)

    @torch.inference_mode()
    def forward(self, works: Sequence[Work]) -> Tensor:
        """Compute each work's tokens and store their keys and values.

        Returns:
            Logits float32[len(works), vocab] behind the last token of each work.
        """
        # Decodes first and by length, so that those of similar length lie next to each other.
        order = sorted(range(len(works)), key=lambda i: (works[i].count > 1, works[i].position))
        ordered = [works[i] for i in order]
        columns = torch.tensor(_columns(ordered, self.kv.block_size), device=self._device)
        ids, positions, slots = columns.unbind()
        tails = [0] * len(works)
        stop = 0
        for i in order:
            stop += works[i].count
            tails[i] = stop - 1
        step = Step(self.kv, slots, self._fresh_blocks(ordered), list(self._spans(ordered)))
        return self._call(ids[None], positions[None], torch.tensor(tails, device=self._device), step)

    def _call(self, ids: Tensor, positions: Tensor, tails: Tensor, step: Step) -> Tensor:
        output = self._model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=tails, **{STEP_KEYWORD: step}
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
            first_slot=table[0] * self.kv.block_size if is_run else None,
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
