"""The bound on the divergence against the divergence itself, as torch computes it over the whole vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from service.reports.bench_client import NUM_TOP, Position
from service.reports.bench_quality import MAX_WINDOWS, WINDOW_TOKENS, compare, kl_lower_bound, windows

ROUNDING = 2e-5
"""1e-6 of a sum of float32 probabilities, times the logarithm of a ratio of up to as much, and one."""


def position(logits: Tensor, token_id: int) -> Position:
    """What a server tells of a distribution."""
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(NUM_TOP, len(logprobs)))
    return Position(
        token_id, float(logprobs[token_id]), dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )


def divergence(reference: Tensor, other: Tensor) -> float:
    return float(functional.kl_div(other.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum"))


def distributions(vocab_size: int, *, noise: float, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab_size, generator=generator) * scale
    return logits, logits + noise * torch.randn(vocab_size, generator=generator)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3, 3.0])
@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("vocab_size", [21, 50, 4096])
def test_the_bound_is_never_above_the_divergence(vocab_size: int, scale: float, noise: float) -> None:
    for seed in range(20):
        reference, other = distributions(vocab_size, noise=noise, scale=scale, seed=seed)
        nats, compared = kl_lower_bound(position(reference, seed % 21), position(other, seed % 21))
        assert 0 <= nats <= divergence(reference, other) + ROUNDING
        assert 0 < compared <= 1


def test_the_bound_is_the_divergence_where_every_token_is_told() -> None:
    for seed in range(20):
        reference, other = distributions(NUM_TOP, noise=0.5, scale=2.0, seed=seed)
        nats, compared = kl_lower_bound(position(reference, 3), position(other, 3))
        assert nats == pytest.approx(divergence(reference, other), abs=ROUNDING)
        assert compared == pytest.approx(1, abs=ROUNDING)


def test_the_bound_is_near_where_the_told_tokens_have_almost_all_of_the_probability() -> None:
    reference, other = distributions(4096, noise=0.2, scale=8.0, seed=1)
    nats, compared = kl_lower_bound(position(reference, 0), position(other, 0))
    assert compared > 0.95
    assert nats > 0.8 * divergence(reference, other)


def test_the_token_of_the_text_is_compared_though_it_is_unlikely() -> None:
    shared = {token_id: math.log(0.04) for token_id in range(NUM_TOP)}
    nats, compared = kl_lower_bound(Position(99, math.log(0.1), shared), Position(99, math.log(0.05), shared))
    assert compared == pytest.approx(0.9)
    assert nats == pytest.approx(0.1 * math.log(0.1 / 0.05) + 0.1 * math.log(0.1 / 0.15), abs=ROUNDING)


def test_equal_servers_are_no_nats_apart() -> None:
    logits, _ = distributions(100, noise=0.0, scale=2.0, seed=0)
    own = position(logits, 7)
    quality = compare([([own, own], [own, own])], reference="a", other="b")
    assert (quality.kl_mean_nats, quality.kl_p99_nats, quality.top1_ratio) == (0, 0, 1)
    assert quality.reference_perplexity == quality.other_perplexity == pytest.approx(math.exp(-own.logprob))
    assert (quality.num_tokens, quality.num_windows) == (2, 1)


def test_perplexity_and_agreement_are_exact() -> None:
    first = Position(1, -1.0, {1: -1.0, 2: -1.5})
    second = Position(1, -2.0, {2: -1.2, 1: -2.0})
    quality = compare([([first], [second]), ([first], [first])], reference="a", other="b")
    assert quality.reference_perplexity == pytest.approx(math.e)
    assert quality.other_perplexity == pytest.approx(math.exp(1.5))
    assert quality.top1_ratio == 0.5
    assert quality.num_windows == 2


def test_a_loss_that_has_no_perplexity_in_floats_is_no_error() -> None:
    lowest = Position(1, -9999.0, {2: -0.1})
    assert math.isfinite(compare([([lowest], [lowest])], reference="a", other="b").other_perplexity)


@pytest.mark.parametrize(
    ("num_tokens", "prefix", "max_model_len", "lengths"),
    [
        (600, [], 1024, [256, 256]),
        (600, [7], 1024, [256, 256]),
        (100, [7], 1024, [101]),
        (100, [7], 33, [32, 32, 32]),
        (1, [], 1024, []),
        (100, [], 2, []),
        (100_000, [], 1024, [WINDOW_TOKENS] * MAX_WINDOWS),
    ],
)
def test_windows_fit_the_context_and_begin_alike(
    num_tokens: int, prefix: list[int], max_model_len: int, lengths: list[int]
) -> None:
    pieces = windows(range(10, 10 + num_tokens), prefix, max_model_len=max_model_len)
    assert [len(piece) for piece in pieces] == lengths
    assert all(piece[: len(prefix)] == prefix for piece in pieces)
    read = [token for piece in pieces for token in piece[len(prefix) :]]
    assert read == list(range(10, 10 + len(read)))
