"""Attention over KV blocks, as the function that transformers' models call in place of their own.

The tokens of a step lie end to end in one row `[1, T]`. A `Step` says which columns belong to which
sequence; it travels through the model as the keyword `STEP_KEYWORD` and arrives here once per layer.
A row reads only what its own sequence wrote, or zeros, so that NaN never reaches a neighbour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's documentation uses
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from service.engine.blocks import KVBlocks
from service.errors import UnsupportedModel
from service.kernels import dispatch
from service.kernels.native_attention import Attention, Rows

ATTENTION_NAME = "pennyweight"
"""Name under which the attention and mask functions are registered."""

STEP_KEYWORD = "pennyweight_step"
"""Keyword of `forward` that carries the step."""


@dataclass(slots=True)
class Span:
    """Columns `start .. stop - 1` of the row, attended together, and the masks that its layers share."""

    start: int
    stop: int
    biases: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict, init=False)

    def attend(self, queries: Tensor, kv: KVBlocks, layer_idx: int, options: Attention) -> Tensor:
        """Attend queries [stop - start, heads, dk] to all tokens of their sequences: [stop - start, heads, dv]."""
        raise NotImplementedError


@dataclass(slots=True)
class Decodes(Span):
    """One token each of several sequences, attended in one batch.

    Attributes:
        lengths: int64[rows], tokens of each sequence, this one included.
        block_tables: int64[rows, n]; a shorter sequence repeats its own first block.
    """

    lengths: Tensor
    block_tables: Tensor

    def attend(self, queries: Tensor, kv: KVBlocks, layer_idx: int, options: Attention) -> Tensor:
        """See `Span.attend`; the query heads of one KV head become rows of one product."""
        keys, values = kv.gather(layer_idx, self.block_tables)
        bias = self._bias(keys.shape[1], options.sliding_window, queries.dtype)
        return _attend_single_tokens(queries, keys, values, bias, options)

    def _bias(self, num_keys: int, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        bias = self.biases.get((sliding_window, dtype))
        if bias is None:
            lengths = self.lengths[:, None]
            positions = torch.arange(num_keys, device=lengths.device)
            hidden = positions >= lengths
            if sliding_window is not None:
                hidden |= positions < lengths - sliding_window
            bias = _bias_of(hidden, dtype)[:, None, None, :]
            self.biases[sliding_window, dtype] = bias
        return bias


@dataclass(slots=True)
class Chunk(Span):
    """Tokens of one sequence that follow one another: part of a prompt, or a single token.

    Attributes:
        position: of the first of them.
        first_slot: slot of the sequence's first token if its blocks follow one another, else None.
        block_table: int64[1, n].
    """

    position: int
    first_slot: int | None
    block_table: Tensor

    def attend(self, queries: Tensor, kv: KVBlocks, layer_idx: int, options: Attention) -> Tensor:
        """See `Span.attend`; only keys that some query sees are read."""
        window = options.sliding_window
        first = 0 if window is None else max(0, self.position - window + 1)
        last = self.position + self.stop - self.start
        keys, values = self._read(kv, layer_idx, first, last)
        if len(queries) == 1:
            return _attend_single_tokens(queries, keys[None], values[None], None, options)
        bias = self._bias(first, window, queries.dtype)
        return _attend_chunk(queries, keys, values, bias, options)

    def _read(self, kv: KVBlocks, layer_idx: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        if self.first_slot is not None:
            return kv.view(layer_idx, self.first_slot + first, self.first_slot + last)
        keys, values = kv.gather(layer_idx, self.block_table)
        return keys[0, first:last], values[0, first:last]

    def _bias(self, first: int, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        bias = self.biases.get((sliding_window, dtype))
        if bias is None:
            last = self.position + self.stop - self.start
            keys = torch.arange(first, last, device=self.block_table.device)
            queries = keys[self.position - first :, None]
            hidden = keys > queries
            if sliding_window is not None:
                hidden |= keys <= queries - sliding_window
            bias = self.biases[sliding_window, dtype] = _bias_of(hidden, dtype)
        return bias


@dataclass(slots=True)
class Step:
    """One forward: where its tokens go and how its columns are attended. Used once.

    Attributes:
        slots: int64[T], where the keys and values of each column are stored.
        fresh_blocks: int64[n], blocks that this step begins and does not fill.
        rows: whose tokens the columns are, in order; for kernels, which attend all of them at once.
        make_spans: makes the same for torch, which attends one of them after the other.
    """

    kv: KVBlocks
    slots: Tensor
    fresh_blocks: Tensor | None
    rows: Rows
    make_spans: Callable[[], list[Span]]
    entered: set[int] = field(default_factory=set, init=False)
    made_spans: list[Span] | None = field(default=None, init=False)

    @property
    def spans(self) -> list[Span]:
        """Made when the first layer asks: kernels need none, and views of tensors take a while."""
        if self.made_spans is None:
            self.made_spans = self.make_spans()
        return self.made_spans

    def append(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, kv_heads, ..] of one layer.

        Raises:
            UnsupportedModel: the layer comes a second time; its first keys would be lost.
        """
        if layer_idx in self.entered:
            raise UnsupportedModel(
                f"layer {layer_idx} attends twice in one forward; each layer may attend once; use another model"
            )
        self.entered.add(layer_idx)
        self.kv.add_layer(layer_idx, keys, values)
        if self.fresh_blocks is not None:
            # What an earlier owner left behind the last token is read, masked: it must at least be finite.
            self.kv.clear(layer_idx, self.fresh_blocks)
        self.kv.append(layer_idx, keys, values, self.slots)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pennyweight_step: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_ignored: object,
) -> tuple[Tensor, None]:
    """Store the keys and values of one layer and attend to all that its sequences have stored.

    `query` is [1, heads, T, dk], `key` [1, kv_heads, T, dk], `value` [1, kv_heads, T, dv]. There is no
    mask: the step says what each column may see. Other keywords that a family passes are of no
    concern here.

    Returns:
        [1, T, heads, dv], and no attention weights.
    """
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    step = pennyweight_step
    step.append(layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
    queries = query[0].transpose(0, 1)
    factor = queries.shape[-1] ** -0.5 if scaling is None else scaling
    options = Attention(factor, sliding_window, softcap, s_aux)
    out = dispatch.attend(queries, *step.kv.stored(layer_idx), step.rows, how=options)
    if out is not None:
        return out[None], None
    if len(step.spans) == 1:
        return step.spans[0].attend(queries, step.kv, layer_idx, options)[None], None
    parts = [span.attend(queries[span.start : span.stop], step.kv, layer_idx, options) for span in step.spans]
    return torch.cat(parts)[None], None


def no_mask(*_args: object, **_kwargs: object) -> None:
    """Make no mask: the step has what is needed."""


def install(model: nn.Module) -> None:
    """Make a model attend through `attend`.

    Raises:
        UnsupportedModel: it is not a transformers model, or keeps its own attention.
    """
    if isinstance(model, PreTrainedModel):
        AttentionInterface.register(ATTENTION_NAME, attend)
        AttentionMaskInterface.register(ATTENTION_NAME, no_mask)
        model.set_attn_implementation(ATTENTION_NAME)
        if model.config.get_text_config()._attn_implementation == ATTENTION_NAME:
            return
    raise UnsupportedModel(
        f"{type(model).__name__} does not take an attention function from outside; "
        "only models that use transformers' attention interface are served; use another model"
    )


def stock_attention(model: nn.Module) -> str | None:
    """The attention that transformers chose for a model; `eager` if it attends through `attend` already."""
    name: str | None = getattr(model.config, "_attn_implementation", None)
    return "eager" if name == ATTENTION_NAME else name


def set_attention(model: nn.Module, name: str | None) -> None:
    """Make a model attend in one of its own ways; one that knows only one way is left alone."""
    if name is not None and isinstance(model, PreTrainedModel) and model.config._attn_implementation != name:
        model.set_attn_implementation(name)


def _attend_single_tokens(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, options: Attention
) -> Tensor:
    """Attend queries [rows, heads, dk], one per sequence, to keys [rows, n, kv_heads, dk]."""
    rows, heads, _ = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(rows, kv_heads, heads // kv_heads, -1)
    sinks = None if options.sinks is None else options.sinks.view(kv_heads, -1, 1)
    out = _attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), bias, sinks, options)
    return out.reshape(rows, heads, -1)


def _attend_chunk(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, options: Attention) -> Tensor:
    """Attend queries [count, heads, dk] of one sequence to keys [n, kv_heads, dk] under bias [count, n]."""
    kv_heads = keys.shape[1]
    shape = (kv_heads, queries.shape[1] // kv_heads)
    grouped = queries.transpose(0, 1).view(*shape, *queries.shape[::2])  # [kv_heads, repeats, count, dk]
    # Stride 0 along the repeats: each KV head is read by its query heads without a copy.
    keys, values = (x.transpose(0, 1)[:, None].expand(-1, shape[1], -1, -1) for x in (keys, values))
    sinks = None if options.sinks is None else options.sinks.view(*shape, 1, 1)
    out = _attention(grouped, keys, values, bias, sinks, options)
    return out.flatten(0, 1).transpose(0, 1)


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, sinks: Tensor | None, options: Attention
) -> Tensor:
    """Softmax attention of [.., q, dk] to [.., n, dk]; `bias` and `sinks` broadcast to the scores [.., q, n]."""
    if options.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=options.scaling)
    scores = queries @ keys.mT * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if bias is not None:
        scores = scores + bias
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
    # A sink takes part in the normalization and has no value.
    scores = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), dim=-1)
    return scores.softmax(-1, dtype=torch.float32)[..., :-1].to(values.dtype) @ values


def _bias_of(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, -inf where `hidden` bool[...]."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
