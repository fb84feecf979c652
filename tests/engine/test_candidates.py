from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from service.engine.candidates import (
    NUM_CANDIDATES,
    Candidates,
    Limits,
    block_maxima,
    cut,
    draw,
    find_candidates,
    likeliest,
    top,
)
from service.engine.sequence import SamplingParams

SHAPES = {"flat": 0.1, "even": 1.0, "peaked": 5.0}
VOCAB_SIZES = [1, 2, 255, 257, 1000, 5003]


def make_logits(vocab_size: int, scale: float = 1.0, rows: int = 1) -> Tensor:
    return scale * torch.randn((rows, vocab_size), generator=torch.Generator().manual_seed(vocab_size))


def found(logits: Tensor, params: list[SamplingParams], num_candidates: int) -> Candidates:
    return find_candidates(logits, Limits.of(params, logits.device), num_candidates)


def dense(candidates: Candidates, vocab_size: int) -> Tensor:
    """Probabilities float32[rows, vocab]."""
    weights = torch.zeros(len(candidates.ids), vocab_size).scatter_(1, candidates.ids, candidates.weights)
    return weights / weights.sum(1, keepdim=True)


def warped(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Probabilities by the candidates where they are said to be exact, else by a cut of the whole vocabulary."""
    probabilities = cut_off(logits, params)
    candidates = found(logits, params, NUM_CANDIDATES)
    probabilities[candidates.is_exact] = dense(candidates, logits.shape[1])[candidates.is_exact]
    return probabilities


def cut_off(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Probabilities float32[rows, vocab] by a cut of the whole vocabulary."""
    factors = Limits.of(params, logits.device).inverse_temperature
    rows = [cut(row, one, factor) for row, one, factor in zip(logits, params, factors, strict=True)]
    return (torch.stack(rows) * factors).softmax(1)


def oracle(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities float32[rows, vocab] by transformers' processors, in the order of its `generate`."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    scores: Tensor = processors(torch.zeros(1, 1, dtype=torch.int64), logits)  # type: ignore[arg-type]
    return scores.softmax(-1)


@pytest.mark.parametrize("scale", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_probabilities_equal_those_of_transformers_processors(scale: float, temperature: float) -> None:
    logits = make_logits(5003, scale)
    params = [
        SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for top_k, top_p, min_p in itertools.product([0, 1, 5, 300, 5000], [0.01, 0.5, 0.95, 1.0], [0, 0.02, 0.4, 1])
    ]
    ours = warped(logits.repeat(len(params), 1), params)
    theirs = torch.cat([oracle(logits, one) for one in params])
    assert torch.equal(ours > 0, theirs > 0)
    # Division before or after subtracting the peak: logits round by 2^-24 of their size, here at most 70. Below
    # 2^-126 float32 has fewer digits.
    torch.testing.assert_close(ours, theirs, rtol=70 * 2**-22, atol=2**-126)


@pytest.mark.parametrize(
    ("scale", "limits", "needed"),
    [
        (5.0, {"top_p": 0.5}, 256),
        (1.0, {"top_k": 255}, 256),
        (1.0, {"top_k": 256}, 4096),  # whether more are as likely as the last is not known
        (1.0, {"top_k": 300, "top_p": 0.01}, 4096),
        (1.0, {"top_p": 0.5}, 4096),
        (0.1, {"top_p": 0.95}, 5003),
        (1.0, {"top_k": 4097}, 5003),
        (0.1, {"min_p": 0.1}, 5003),
        (0.1, {"min_p": 1}, 256),
    ],
    ids=str,
)
def test_as_many_candidates_are_said_to_suffice_as_do(scale: float, limits: dict[str, float], needed: int) -> None:
    logits, params = make_logits(5003, scale), [SamplingParams(max_tokens=1, **limits)]  # type: ignore[arg-type]
    whole = found(logits, params, 5003)
    for num_candidates in (256, 4096, 5003):
        candidates = found(logits, params, num_candidates)
        assert bool(candidates.is_exact) == (num_candidates >= needed)
        if candidates.is_exact:
            assert torch.equal(candidates.ids, whole.ids[:, :num_candidates])
            assert torch.equal(candidates.weights, whole.weights[:, :num_candidates])
            assert not whole.weights[:, num_candidates:].any()


@pytest.mark.parametrize("decimals", [0, 2, 7])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.0])
@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 1},
        {"top_k": 300},
        {"top_k": 5000, "top_p": 0.9},
        {"top_k": 9999, "top_p": 0.9},
        {"top_p": 0.01},
        {"top_p": 0.999, "min_p": 0.01},
    ],
    ids=str,
)
def test_a_cut_keeps_what_a_sort_of_the_whole_vocabulary_keeps(
    decimals: int, temperature: float, limits: dict[str, float]
) -> None:
    logits = make_logits(5003, rows=3).round(decimals=decimals)
    logits[:, 17::7] = -torch.inf
    params = [SamplingParams(max_tokens=1, temperature=temperature, **limits)] * 3  # type: ignore[arg-type]
    sorted_out = dense(found(logits, params, 5003), 5003)
    assert torch.equal(cut_off(logits, params) > 0, sorted_out > 0)


@pytest.mark.parametrize("decimals", [0, 1, 2])
@pytest.mark.parametrize(
    "limits",
    [{"top_k": 3}, {"top_k": 200}, {"top_k": 256}, {"top_k": 300, "top_p": 0.9}, {"top_p": 0.3}, {"min_p": 0.3}],
    ids=str,
)
def test_the_shortcut_gives_what_the_whole_vocabulary_gives_among_ties(decimals: int, limits: dict[str, float]) -> None:
    logits = make_logits(5003).mul(2).round(decimals=decimals)  # many tokens are equally likely
    params = [SamplingParams(max_tokens=1, **limits)]  # type: ignore[arg-type]
    whole = found(logits, params, 5003)
    short = found(logits, params, 256)
    if short.is_exact:
        num_kept = int((whole.weights > 0).sum())
        assert torch.equal(short.ids[:, :num_kept], whole.ids[:, :num_kept])
        assert torch.equal(short.weights[:, :num_kept], whole.weights[:, :num_kept])
    if "top_p" not in limits:  # among equally likely ones at its edge, which it keeps is up to the sort
        assert torch.equal(dense(whole, 5003) > 0, oracle(logits, params[0]) > 0)
    for uniform in torch.linspace(0, 1, 37, dtype=torch.float64)[:-1]:
        drawn = draw(logits, params, uniform[None])
        cumulative = dense(whole, 5003).double().cumsum(1)
        assert drawn == torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[0]


@pytest.mark.parametrize("limits", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_an_error_of_rounding_that_swaps_two_tokens_draws_no_other_one(limits: dict[str, float]) -> None:
    logits = make_logits(5003, rows=1)
    logits[0, 7] = logits[0, 4000] = logits.amax()
    uniforms = torch.linspace(0, 1, 301, dtype=torch.float64)[:-1]
    params = [SamplingParams(max_tokens=1, **limits)] * len(uniforms)  # type: ignore[arg-type]
    drawn = []
    for larger in (7, 4000):
        off = logits.expand(len(uniforms), -1).clone()
        off[:, larger] = torch.nextafter(off[:, larger], torch.tensor(torch.inf))
        drawn.append(draw(off, params, uniforms).tolist())
    assert drawn[0] == drawn[1]
    assert limits == {} or {7, 4000} <= set(drawn[0])


def test_zeros_of_both_signs_are_equally_likely() -> None:
    logits = torch.tensor([-0.0, 0.0, -0.0, -0.0] * 300)
    for params in (SamplingParams(max_tokens=1, top_p=0.5), SamplingParams(max_tokens=1, top_k=1199)):
        kept = cut(logits, params, torch.ones(()))
        assert kept.isfinite().sum() == (600 if params.top_p < 1 else 1200)


@pytest.mark.parametrize("vocab_size", [*VOCAB_SIZES, 256, 512])
def test_the_likeliest_is_the_first_of_the_largest(vocab_size: int) -> None:
    logits = torch.cat([make_logits(vocab_size, rows=9), make_logits(vocab_size, rows=9).round()])
    logits[0] = -torch.inf
    logits[0, -1] = -1e38
    for row, token in zip(logits.tolist(), likeliest(logits, block_maxima(logits)).tolist(), strict=True):
        assert token == row.index(max(row))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("count", [1, 20, 256])
def test_the_top_is_that_of_a_stable_sort(vocab_size: int, count: int) -> None:
    count = min(count, vocab_size)
    values, ids = make_logits(vocab_size, rows=3).sort(dim=1, descending=True, stable=True)
    found_values, found_ids = top(make_logits(vocab_size, rows=3), count)
    assert torch.equal(found_values, values[:, :count])
    assert torch.equal(found_ids, ids[:, :count])
    ties = make_logits(vocab_size, rows=3).round()
    assert torch.equal(top(ties, count)[0], ties.sort(dim=1, descending=True).values[:, :count])


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6], ids=str)
@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9}, {"top_k": 7}, {"min_p": 0.1}], ids=str)
def test_a_tiny_temperature_gives_the_likeliest_token(temperature: float, limits: dict[str, float]) -> None:
    logits = make_logits(5003, 50.0, rows=2)
    params = [SamplingParams(max_tokens=1, temperature=temperature, **limits)] * 2  # type: ignore[arg-type]
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert torch.equal(draw(logits, params, torch.full((2,), uniform, dtype=torch.float64)), logits.argmax(1))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("limits", [{}, {"top_p": 0.999999}], ids=["whole-vocabulary", "candidates"])
def test_a_token_without_probability_is_never_drawn(vocab_size: int, limits: dict[str, float]) -> None:
    logits = make_logits(vocab_size)
    logits[:, 1::2] = -torch.inf
    params = [SamplingParams(max_tokens=1, **limits)]  # type: ignore[arg-type]
    for uniform in (0.0, 1e-300, 0.25, 0.5, 0.75, 1 - 2**-53):
        assert draw(logits, params, torch.tensor([uniform], dtype=torch.float64)) % 2 == 0


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_the_whole_vocabulary_is_drawn_by_its_cumulative_distribution(vocab_size: int) -> None:
    uniforms = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = make_logits(vocab_size)
    params = [SamplingParams(max_tokens=1, temperature=1.3)] * len(uniforms)
    drawn = draw(logits.expand(len(uniforms), -1), params, uniforms)
    cumulative = (logits[0].double() / 1.3).softmax(0).cumsum(0)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), cumulative])[drawn]
    # Float32 weights are off by 2^-21 of themselves at most: the products round, and exp of them up to 10.
    assert bool((uniforms >= below - 2**-21).all())
    assert bool((uniforms <= cumulative[drawn] + 2**-21).all())


def test_a_row_is_drawn_as_it_is_alone() -> None:
    variants = [{}, {"top_k": 5}, {"top_k": 300}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_p": 0.999, "temperature": 2}]
    params = [SamplingParams(max_tokens=1, **variant) for variant in variants * 3]  # type: ignore[arg-type]
    logits = make_logits(5003, 2.0, rows=len(params))
    uniforms = torch.rand(len(params), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = draw(logits, params, uniforms)
    alone = [draw(logits[i : i + 1], params[i : i + 1], uniforms[i : i + 1]) for i in range(len(params))]
    assert torch.equal(together, torch.cat(alone))
