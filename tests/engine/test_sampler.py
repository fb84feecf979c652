from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from service.engine.sampler import Sampler, warp
from service.engine.sequence import SamplingParams

SHAPES = {"flat": 0.1, "even": 1.0, "peaked": 5.0}


def make_logits(vocab_size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))


def warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities float32[vocab] that `warp` leaves."""
    candidates, probabilities = warp(logits, params)
    if candidates is None:
        return probabilities
    return torch.zeros_like(logits).index_put_((candidates,), probabilities)


def oracle(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities float32[vocab] by transformers' processors."""
    ids, scores = torch.zeros(1, 1, dtype=torch.int64), logits[None]
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    probabilities: Tensor = scores.softmax(-1)[0]
    return probabilities


@pytest.mark.parametrize("scale", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 300, 1000])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 1.0])
def test_probabilities_equal_those_of_transformers_processors(
    scale: float, temperature: float, top_k: int, top_p: float
) -> None:
    logits = make_logits(1000, scale)
    params = SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    ours, theirs = warped(logits, params), oracle(logits, params)
    assert torch.equal(ours > 0, theirs > 0)
    # Division before or after subtracting the peak: logits round by 2^-24 of their size, here at most 60.
    torch.testing.assert_close(ours, theirs, rtol=60 * 2**-22, atol=0)


@pytest.mark.parametrize("top_k", [3, 200, 256])
def test_tokens_as_likely_as_the_kth_are_kept(top_k: int) -> None:
    logits = make_logits(1000).mul(2).round()  # many ties, also across the first 256
    params = SamplingParams(max_tokens=1, top_k=top_k)
    assert torch.equal(warped(logits, params) > 0, oracle(logits, params) > 0)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6], ids=str)
def test_a_tiny_temperature_gives_the_likeliest_token(temperature: float) -> None:
    logits = make_logits(300, 50.0)
    probabilities = warped(logits, SamplingParams(max_tokens=1, temperature=temperature, top_p=0.9))
    assert probabilities[logits.argmax()] == 1


def test_temperature_0_is_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 7.0, 7.0], [3.0, -1.0, 2.0]])
    rows = [(name, SamplingParams(max_tokens=1, temperature=0)) for name in "ab"]
    assert Sampler().sample(logits, rows) == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "bad",
    [[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [math.nan, math.inf, 0.0], [-math.inf] * 3],
    ids=["nan", "inf", "both", "all-minus-inf"],
)
def test_a_row_without_a_finite_peak_gets_no_token(temperature: float, bad: list[float]) -> None:
    params = SamplingParams(max_tokens=1, temperature=temperature, seed=0)
    good = [-math.inf, -math.inf, 2.0]  # a mask is no fault
    tokens = Sampler().sample(torch.tensor([good, bad, good]), [(name, params) for name in "abc"])
    assert tokens == [2, None, 2]


@pytest.mark.parametrize("top_k", [0, 4], ids=["whole-vocabulary", "candidates"])
def test_tokens_come_as_often_as_their_probability(top_k: int) -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    logits = probabilities.log()
    params = SamplingParams(max_tokens=1, seed=1, top_k=top_k)
    sampler, num_draws = Sampler(), 4000
    tokens = [sampler.sample(logits[None], [("a", params)])[0] for _ in range(num_draws)]
    for token, probability in enumerate(probabilities.tolist()):
        spread = math.sqrt(probability * (1 - probability) / num_draws)
        assert abs(tokens.count(token) / num_draws - probability) <= 5 * spread


def test_a_seed_gives_the_same_tokens_whatever_its_neighbours() -> None:
    logits = make_logits(500)
    mine = ("mine", SamplingParams(max_tokens=9, seed=7, top_p=0.9))
    alone, together = Sampler(), Sampler()
    expected = [alone.sample(logits[None], [mine])[0] for _ in range(20)]
    neighbours = [
        ("other", SamplingParams(max_tokens=9, seed=7)),
        ("greedy", SamplingParams(max_tokens=9, temperature=0)),
    ]
    rows = [*neighbours, mine]
    assert [together.sample(logits.expand(3, -1), rows)[2] for _ in range(20)] == expected
    assert len(set(expected)) > 10


def test_a_forgotten_sequence_begins_its_seed_again() -> None:
    logits, rows = make_logits(500)[None], [("a", SamplingParams(max_tokens=9, seed=-(2**63)))]
    sampler = Sampler()
    first, second = sampler.sample(logits, rows), sampler.sample(logits, rows)
    sampler.forget("a")
    assert sampler.sample(logits, rows) == first != second


def test_without_a_seed_two_sequences_differ() -> None:
    logits = make_logits(500).expand(2, -1)
    rows = [(name, SamplingParams(max_tokens=9)) for name in "ab"]
    sampler = Sampler()
    drawn = [sampler.sample(logits, rows) for _ in range(20)]
    assert [a for a, _ in drawn] != [b for _, b in drawn]
