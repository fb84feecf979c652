"""Whether the kernels compute on this machine what torch does: asked once, before a model is served with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from service.kernels import native_attention, native_sampling, reference
from service.kernels.native import Library, packed_weight
from service.kernels.native_attention import Attention, Rows, Stored
from service.kernels.native_sampling import Draw
from service.numerics.encode import EncodedWeight, encode
from service.numerics.schemes import QuantScheme, parse_scheme

_SCHEMES: Final = ("w8a16", "w4a16-g64", "nf4", "q4_1")
_SIZE: Final = (65, 200)  # outputs and inputs: neither fills its strips and tiles
_ROWS: Final = (1, 8, 80)  # of each regime
_BOUND: Final = 4 * 2**-8
"""Of errors relative to the norm of the product: either side rounds weights and results to bfloat16 at most."""
_LENGTHS, _COUNTS = (32, 61, 85, 100), (1, 1, 7, 50)
"""Tokens of sequences, and how many of them attend: more than kernels take at once, and less than a multiple of it."""
_NUM_LOGPROBS: Final = 20
_LOGPROBS_BOUND: Final = 2**-16
"""Of errors of log-probabilities, in nats: logits up to 16 and the sums of exponentials are rounded to float32."""

Multiply = Callable[[Tensor, EncodedWeight, QuantScheme], Tensor]


def is_right(library: Library) -> bool:
    """Whether products, attention and choices of tokens of a library agree with torch's; 10 ms."""
    out_features, in_features = _SIZE

    def multiply(x: Tensor, encoded: EncodedWeight, scheme: QuantScheme) -> Tensor:
        weight = packed_weight(
            encoded.qweight,
            encoded.scales,
            encoded.zero_points,
            scheme=scheme,
            out_features=out_features,
            in_features=in_features,
        )
        return library.linear(x, weight, None)

    return agrees(multiply) and _attends(library) and _finds_likeliest(library) and _draws(library)


def agrees(multiply: Multiply) -> bool:
    """Whether products of bfloat16 activations agree with torch's, for each kind of format and number of rows."""
    generator = torch.Generator().manual_seed(0)
    for scheme in map(parse_scheme, _SCHEMES):
        encoded = encode(torch.randn(_SIZE, generator=generator), scheme)
        for rows in _ROWS:
            x = torch.randn(rows, _SIZE[1], generator=generator).bfloat16()
            expected = _by_torch(x.float(), encoded, scheme)
            error = (multiply(x, encoded, scheme).float() - expected).norm() / expected.norm()
            if not error <= _BOUND:  # NaN is none
                return False
    return True


def _attends(library: Library) -> bool:
    """Whether single tokens, a few and many of a sequence attend rightly, in one call."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randint(-127, 128, (28, 16, 2, 40), generator=generator) for _ in range(2))
    queries = torch.randn(sum(_COUNTS), 6, 40, generator=generator).bfloat16().float()
    tables = torch.randperm(28, generator=generator).view(len(_COUNTS), -1)
    how = Attention(scaling=40**-0.5)
    expected = []
    for own, table, length in zip(torch.split(queries, list(_COUNTS)), tables, _LENGTHS, strict=True):
        seen = (2**-6 * x[table].flatten(0, 1)[:length].repeat_interleave(3, 1).transpose(0, 1) for x in (keys, values))
        own_keys, own_values = seen
        is_seen = torch.ones(len(own), length, dtype=torch.bool).tril(length - len(own))
        own = own.transpose(0, 1)
        attended = functional.scaled_dot_product_attention(own, own_keys, own_values, is_seen, scale=how.scaling)
        expected.append(attended.transpose(0, 1))
    starts = torch.arange(len(_COUNTS) + 1) * tables.shape[1]
    rows = Rows(tables.flatten(), starts, torch.tensor(_LENGTHS), torch.tensor(_COUNTS))
    scales = torch.full((28, 16, 2, 1), 2**-6, dtype=torch.bfloat16)
    for dtype, is_int8 in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        stored_keys, stored_values = (
            Stored(x.to(torch.int8), scales) if is_int8 else Stored((2**-6 * x).to(dtype)) for x in (keys, values)
        )
        found = native_attention.attend(library, queries.to(dtype), stored_keys, stored_values, rows, how=how).float()
        for part, right in zip(torch.split(found, list(_COUNTS)), expected, strict=True):
            if not (part - right).norm() / right.norm() <= _BOUND:
                return False
    return True


def _draws(library: Library) -> bool:
    """Whether uniform numbers in the middle of some tokens' shares give these tokens."""
    logits = 3 * torch.randn((1, 3001), generator=torch.Generator().manual_seed(0))
    shares = logits[0].double().softmax(0)
    middles = (shares.cumsum(0) - shares / 2).tolist()
    tokens = shares.topk(_NUM_LOGPROBS).indices.tolist()
    draws = [Draw(0, 0, 1.0, 1.0, 0.0, middles[token]) for token in tokens]
    return native_sampling.draw(library, logits, draws) == tokens


def _finds_likeliest(library: Library) -> bool:
    logits = 3 * torch.randn((3, 3001), generator=torch.Generator().manual_seed(0))
    tokens = native_sampling.find_peaks(library, logits).tokens
    own, ids, values = native_sampling.read_logprobs(library, logits, tokens, _NUM_LOGPROBS)
    expected = logits.log_softmax(1).topk(_NUM_LOGPROBS)
    error = (torch.tensor(values) - expected.values).abs().max()
    is_first = [row[0] for row in ids] == tokens and [row[0] for row in values] == own
    return is_first and ids == expected.indices.tolist() and bool(error <= _LOGPROBS_BOUND)


def _by_torch(x: Tensor, encoded: EncodedWeight, scheme: QuantScheme) -> Tensor:
    return reference.linear(x, *encoded[:3], scheme=scheme, out_features=_SIZE[0], bias=None)
