"""Draws from temperature, top_k, top_p and min_p by torch, many rows at once, without sorting the vocabulary.

The oracle of the kernels that do the same, and what computes where there are none.

What a row gives depends on its own logits, parameters and uniform number only, never on its neighbours or
on how many candidates were looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.sequence import SamplingParams

NUM_CANDIDATES = 256
"""Likeliest tokens that are looked at before all are. A row that keeps more takes 0.7 to 1.7 ms at 49,152 tokens."""
_BUCKET_BITS = 15
"""Low bits of a distance that its bucket leaves out, so that a bucket is at most 2^-8 of a distance wide."""
_NUM_BUCKETS = (0x7F800000 >> _BUCKET_BITS) + 1
"""One for each distance from 0 to infinity, whose bits as float32 these are."""
_GROUP = 4
"""Tokens of which only the largest is looked at first, when the likeliest are sought."""
_BLOCK = 256
"""Tokens that are summed or compared first, when one of the whole vocabulary is drawn or is the likeliest."""
_SLAB = 2**18
"""Logits that are copied at once: pages of larger arrays go back to the system and are faulted in at every step."""
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Limits:
    """Parameters as columns, one entry for each row.

    Attributes:
        inverse_temperature: float32[rows, 1].
        top_k: int64[rows, 1]; 0 keeps all.
        top_p: float64[rows, 1].
        min_p: float32[rows, 1].
    """

    inverse_temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @staticmethod
    def of(params: Seq[SamplingParams], device: torch.device) -> Limits:
        """Collect parameters whose temperatures are above 0."""
        return Limits(
            # Limited, so that a tiny temperature gives no infinity, whose product with 0 would be NaN.
            torch.tensor([[1 / max(p.temperature, TINY)] for p in params], device=device),
            torch.tensor([[p.top_k] for p in params], device=device),
            torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=device),
            torch.tensor([[p.min_p] for p in params], device=device),
        )

    def __getitem__(self, rows: Tensor) -> Limits:
        """Some rows."""
        return Limits(self.inverse_temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest tokens of each row, falling; of equally likely ones the lower id first.

    Attributes:
        ids: int64[rows, candidates].
        weights: float32[rows, candidates] in proportion to their probabilities; 0 for those that are cut off.
        is_exact: bool[rows]; whether looking at more of them would change nothing.
    """

    ids: Tensor
    weights: Tensor
    is_exact: Tensor


def draw(logits: Tensor, params: Seq[SamplingParams], uniforms: Tensor) -> Tensor:
    """Draw a token from each row of logits float32[rows, vocab] with a finite peak.

    Args:
        params: of each row; temperatures are above 0.
        uniforms: float64[rows] in [0, 1), at which the cumulative distributions are inverted.

    Returns:
        int64[rows].
    """
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    is_free = torch.tensor([p.top_k == 0 and p.top_p == 1 and p.min_p == 0 for p in params], device=logits.device)
    limits = Limits.of(params, logits.device)
    free, pending = is_free.nonzero()[:, 0], (~is_free).nonzero()[:, 0]
    if len(free):
        tokens[free] = _draw_of_all(_rows(logits, free), limits[free].inverse_temperature, uniforms[free])
    if len(pending):
        candidates = find_candidates(_rows(logits, pending), limits[pending], NUM_CANDIDATES)
        # In order of ids: rounding may swap two that are nearly as likely, and what is drawn would be another one.
        ids, order = candidates.ids.sort(1)
        places = _invert(candidates.weights.gather(1, order), uniforms[pending, None])
        tokens[pending] = ids.gather(1, places)[:, 0]
        pending = pending[~candidates.is_exact]
    if len(pending):
        kept = torch.stack([cut(logits[row], params[row], limits.inverse_temperature[row]) for row in pending.tolist()])
        tokens[pending] = _draw_of_all(kept, limits[pending].inverse_temperature, uniforms[pending])
    return tokens


def find_candidates(logits: Tensor, limits: Limits, num_candidates: int) -> Candidates:
    """Apply temperature, top_k, top_p and min_p, in this order, to the likeliest tokens of logits float32[rows, vocab].

    Tokens as likely as the k-th are kept too, as transformers does.
    """
    num_candidates = min(num_candidates, logits.shape[1])
    peaks, ids = top(logits, num_candidates)
    scores = (peaks - peaks[:, :1]) * limits.inverse_temperature  # from the peak down, so that nothing overflows
    has_k = limits.top_k > 0
    last = scores[:, -1:]
    kth = scores.gather(1, limits.top_k.clamp(max=num_candidates) - 1 + (~has_k).long())
    weights = torch.where(~has_k | (scores >= kth), scores.exp(), 0)
    cumulative = weights.cumsum(1, dtype=torch.float64)
    total = torch.where(has_k, cumulative[:, -1:], _total_weights(logits, limits))
    is_in_p = (limits.top_p >= 1) | (cumulative - weights < limits.top_p * total)
    is_in_p[:, 0] = True
    weights = torch.where(is_in_p & (weights >= limits.min_p), weights, 0)
    lowest = scores.gather(1, (weights > 0).sum(1, keepdim=True) - 1)
    is_exact = (torch.where(has_k, kth, lowest) > last) | (last.exp() == 0)
    return Candidates(ids, weights, is_exact[:, 0] | (num_candidates == logits.shape[1]))


def cut(logits: Tensor, params: SamplingParams, inverse_temperature: Tensor) -> Tensor:
    """Apply top_k, top_p and min_p to all logits float32[vocab] of a row: minus infinity for what is cut off.

    It keeps what `find_candidates` keeps of the whole vocabulary, without sorting it: tokens are counted into
    buckets by how far below the peak they are, and only in the bucket at the edge they are told apart.
    """
    peak = logits.amax() + 0.0  # no -0: distances from it would be -0 too, whose bits are not those of 0
    distances = (peak - logits).mul_(inverse_temperature)
    buckets = (distances.view(torch.int32) >> _BUCKET_BITS).long()  # their bits rise as positive floats do
    is_kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < params.top_k < len(logits):
        reached = torch.bincount(buckets, minlength=_NUM_BUCKETS).cumsum(0)
        edge = int(torch.searchsorted(reached, params.top_k))
        num_nearer = int(reached[edge - 1]) if edge else 0
        kth = distances[buckets == edge].sort().values[params.top_k - num_nearer - 1]
        is_kept = distances <= kth
    weights = torch.where(is_kept, distances.neg().exp_(), 0)
    if params.top_p < 1:
        reached = torch.bincount(buckets, weights.double(), minlength=_NUM_BUCKETS).cumsum(0)
        limit = params.top_p * reached[-1]
        edge = int(torch.searchsorted(reached, limit))
        members = (buckets == edge).nonzero()[:, 0]
        members = members[distances[members].sort(stable=True).indices]
        inner = weights[members].double()
        nearer = reached[edge - 1] if edge else reached.new_zeros(())
        is_kept &= buckets <= edge
        is_kept[members[nearer + inner.cumsum(0) - inner >= limit]] = False
    return logits.masked_fill(~is_kept | (weights < params.min_p), -math.inf)


def block_maxima(logits: Tensor) -> Tensor:
    """The largest of each block of tokens of contiguous logits float32[rows, vocab]: [rows, blocks].

    NaN counts as the largest value.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = vocab_size // _BLOCK
    if num_blocks * _BLOCK == vocab_size:
        return logits.view(num_rows, num_blocks, _BLOCK).amax(2)
    maxima = logits[:, : num_blocks * _BLOCK].view(num_rows, num_blocks, _BLOCK).amax(2)
    return torch.cat([maxima, logits[:, num_blocks * _BLOCK :].amax(1, keepdim=True)], dim=1)


def likeliest(logits: Tensor, maxima: Tensor) -> Tensor:
    """The first largest of each row of contiguous logits float32[rows, vocab] without NaN, much sooner than `argmax`.

    Args:
        maxima: `block_maxima` of the logits.

    Returns:
        int64[rows].
    """
    vocab_size = logits.shape[1]
    width = min(_BLOCK, vocab_size)
    # The last block may be shorter: before it are tokens of others, none of which is as large.
    starts = (maxima.argmax(1) * _BLOCK).clamp_(max=vocab_size - width)
    places = starts + torch.arange(0, logits.numel(), vocab_size, device=logits.device)
    return starts + logits.view(-1).unfold(0, width, 1).index_select(0, places).argmax(1)


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row of float32[rows, vocab] and their ids, falling; of equal ones the lower id first.

    Which of several equal to the last are among them is not defined.
    """
    values, ids = _largest(logits, count)
    ids, order = ids.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `top`, in no order.

    The `count` groups with the largest maxima hold `count` tokens that none in another group exceeds; to
    find these groups is the same task again. It takes a third of the time of one search through all tokens.
    """
    num_groups = logits.shape[1] // _GROUP
    if num_groups <= 2 * count:
        return logits.topk(count, sorted=False)
    num_grouped = num_groups * _GROUP
    _, groups = _largest(logits[:, :num_grouped].view(-1, _GROUP, num_groups).amax(1), count)
    steps = torch.arange(0, num_grouped, num_groups, device=logits.device)
    rest = torch.arange(num_grouped, logits.shape[1], device=logits.device).expand(len(logits), -1)
    ids = torch.cat([(groups[:, None] + steps[:, None]).flatten(1), rest], dim=1)
    values, places = logits.gather(1, ids).topk(count, sorted=False)
    return values, ids.gather(1, places)


def _total_weights(logits: Tensor, limits: Limits) -> Tensor:
    """Sum float32[rows, 1] of the whole vocabulary's weights where top_p asks for it, else 1."""
    totals = torch.ones_like(limits.inverse_temperature)
    rows = ((limits.top_k == 0) & (limits.top_p < 1))[:, 0].nonzero()[:, 0]
    if len(rows):
        totals[rows] = _block_sums(_rows(logits, rows), limits.inverse_temperature[rows]).sum(1, keepdim=True)
    return totals


def _draw_of_all(logits: Tensor, inverse_temperature: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from the whole vocabulary in order of ids: first a block of tokens, then one in it."""
    sums = _block_sums(logits, inverse_temperature)
    block = _invert(sums, uniforms[:, None])
    cumulative = sums.cumsum(1, dtype=torch.float64)
    # Where in the block the uniform number points to, as a share of the block's weight.
    before = cumulative.gather(1, block) - sums.gather(1, block)
    within = ((uniforms[:, None] * cumulative[:, -1:] - before) / sums.gather(1, block)).clamp(min=0)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    scores = logits.gather(1, ids.clamp(max=logits.shape[1] - 1)) - logits.amax(1, keepdim=True)
    weights = torch.where(ids < logits.shape[1], scores.mul_(inverse_temperature).exp_(), 0)
    return (block * _BLOCK + _invert(weights, within))[:, 0]


def _block_sums(logits: Tensor, inverse_temperature: Tensor) -> Tensor:
    """Sums float32[rows, blocks] of probabilities at a temperature, as shares of the likeliest token's."""
    vocab_size = logits.shape[1]
    width = -(-vocab_size // _BLOCK) * _BLOCK
    num_rows = max(1, _SLAB // width)
    sums = []
    for part, scale in zip(torch.split(logits, num_rows), torch.split(inverse_temperature, num_rows), strict=True):
        scores = part.new_empty((len(part), width))
        scores[:, vocab_size:] = -math.inf
        torch.sub(part, part.amax(1, keepdim=True), out=scores[:, :vocab_size])
        sums.append(scores.mul_(scale).exp_().view(len(part), -1, _BLOCK).sum(2))
    return torch.cat(sums)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Places int64[rows, 1] at which the cumulative sums of weights float32[rows, n] pass shares float64[rows, 1]."""
    cumulative = weights.cumsum(1, dtype=torch.float64)
    places = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    # A share that rounds to the whole would point behind the last token with a weight.
    last = weights.shape[1] - 1 - (weights > 0).flip(1).long().argmax(1, keepdim=True)
    return torch.minimum(places, last)


def _rows(logits: Tensor, rows: Tensor) -> Tensor:
    """Some rows; no copy if they are all."""
    return logits if len(rows) == len(logits) else logits.index_select(0, rows)
