from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from service.engine.sampler import Sampler
from service.engine.sequence import SamplingParams, Sequence
from tests.engine.support import make_prompt, running
from tests.kernels.support import computing_with
from tests.models import build_model


@pytest.fixture(params=["auto", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tokens are chosen natively, where the library is there, and by torch."""
    with computing_with(request.param):
        yield


def make_logits(vocab_size: int) -> Tensor:
    return torch.randn((1, vocab_size), generator=torch.Generator().manual_seed(vocab_size))


def make_sequence(name: str, **params: Any) -> Sequence:
    return Sequence(
        request_id=name,
        token_ids=[1, 2],
        num_prompt_tokens=2,
        params=SamplingParams(**{"max_tokens": 99} | params),
        submitted_at=0,
    )


def sample(sampler: Sampler, logits: Tensor, *sequences: Sequence) -> list[int | None]:
    tokens = sampler.sample(logits.expand(len(sequences), -1).clone(), sequences)
    return [None if token is None else token.token_id for token in tokens]


def run(sampler: Sampler, logits: Tensor, count: int, *sequences: Sequence) -> list[list[int | None]]:
    """Sample `count` times from the same logits; the tokens of each sequence, which they are added to."""
    steps = []
    for _ in range(count):
        steps.append(sample(sampler, logits, *sequences))
        for sequence, token in zip(sequences, steps[-1], strict=True):
            assert token is not None
            sequence.token_ids.append(token)
    return [list(tokens) for tokens in zip(*steps, strict=True)]


def test_temperature_0_is_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 7.0, 7.0], [3.0, -1.0, 2.0]])
    tokens = Sampler().sample(logits, [make_sequence(name, temperature=0) for name in "ab"])
    assert [token and token.token_id for token in tokens] == [1, 0]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"repetition_penalty": 1.1}], ids=str)
@pytest.mark.parametrize(
    "bad",
    [[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [math.nan, math.inf, 0.0], [-math.inf] * 3],
    ids=["nan", "inf", "both", "all-minus-inf"],
)
def test_a_row_without_a_finite_peak_gets_no_token(params: dict[str, float], bad: list[float]) -> None:
    good = [-math.inf, -math.inf, 2.0]  # a mask is no fault
    sequences = [make_sequence(name, **params, seed=0, num_logprobs=1) for name in "abc"]
    first, second, third = Sampler().sample(torch.tensor([good, bad, good]), sequences)
    assert second is None
    assert first is not None
    assert first == third
    assert (first.token_id, first.logprobs) == (2, (0.0, ((2, 0.0),)))


def test_infinite_logits_are_a_fault_also_where_they_are_masked() -> None:
    sequence = make_sequence("a", min_tokens=1, stop_token_ids=frozenset({0}))
    assert sample(Sampler(), torch.tensor([[math.inf, 0.0, 1.0]]), sequence) == [None]


def test_a_step_that_is_computed_twice_samples_the_same_token() -> None:
    logits = make_logits(300)
    once, twice = Sampler(), Sampler()
    expected = run(once, logits, 9, make_sequence("a", seed=3))
    sequence = make_sequence("a", seed=3)
    found = []
    for _ in range(9):
        first, second = sample(twice, logits, sequence), sample(twice, logits, sequence)
        assert first == second
        found += [token for token in first if token is not None]
        sequence.token_ids.append(found[-1])
    assert [found] == expected


@pytest.mark.parametrize("top_k", [0, 4], ids=["whole-vocabulary", "candidates"])
def test_tokens_come_as_often_as_their_probability(top_k: int) -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    num_draws = 4000
    (tokens,) = run(Sampler(), probabilities.log()[None], num_draws, make_sequence("a", seed=1, top_k=top_k))
    for token, probability in enumerate(probabilities.tolist()):
        spread = math.sqrt(probability * (1 - probability) / num_draws)
        assert abs(tokens.count(token) / num_draws - probability) <= 5 * spread


def test_a_seed_gives_the_same_tokens_whatever_its_neighbours() -> None:
    logits = make_logits(5003)
    variants: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"min_p": 0.1, "logit_bias": ((7, 5.0),), "num_logprobs": 3},
        {"temperature": 0},
    ]
    alone = [run(Sampler(), logits, 12, make_sequence("mine", seed=7, **params))[0] for params in variants]
    sequences = [make_sequence(str(i), seed=7, **params) for i, params in enumerate(variants)]
    assert run(Sampler(), logits, 12, *sequences) == alone
    assert all(len(set(tokens)) > 5 for tokens in alone[:3])


def test_a_forgotten_sequence_begins_its_seed_again() -> None:
    logits, sampler = make_logits(500), Sampler()
    first, second = (run(sampler, logits, 4, make_sequence("a", seed=-(2**63))) for _ in range(2))
    sampler.forget("a")
    assert run(sampler, logits, 4, make_sequence("a", seed=-(2**63))) == first != second


def test_without_a_seed_two_sequences_differ() -> None:
    first, second = run(Sampler(), make_logits(500), 20, make_sequence("a"), make_sequence("b"))
    assert first != second


def test_a_stop_token_waits_for_the_fewest_tokens() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    sequence = make_sequence("a", temperature=0, min_tokens=3, stop_token_ids=frozenset({0}))
    assert run(Sampler(), logits, 5, sequence) == [[1, 1, 1, 0, 0]]


def test_logprobs_are_the_models_own_whatever_changes_its_logits() -> None:
    logits = make_logits(300)
    changed = {"temperature": 0.5, "top_k": 3, "logit_bias": ((5, 100.0),), "repetition_penalty": 5.0}
    sequences = [make_sequence("a", **changed, num_logprobs=2), make_sequence("b", **changed)]
    asked, silent = Sampler().sample(logits.repeat(2, 1), sequences)
    assert asked is not None
    assert asked.logprobs is not None
    assert silent is not None
    assert silent.logprobs is None
    expected = logits[0].double().log_softmax(0)
    assert asked.token_id == 5
    assert asked.logprobs.logprob == pytest.approx(expected[5].item(), abs=1e-5)
    assert [token_id for token_id, _ in asked.logprobs.top] == expected.topk(2).indices.tolist()


@pytest.mark.parametrize("penalty", [0.5, 1.5])
def test_greedy_texts_with_a_repetition_penalty_are_those_of_generate(penalty: float) -> None:
    model = build_model("llama")
    prompts = [make_prompt(n) for n in (3, 17, 30)]
    params = SamplingParams(max_tokens=30, temperature=0, repetition_penalty=penalty, num_logprobs=1)
    with running(copy.deepcopy(model)) as (engine, recorder):
        for prompt in prompts:
            engine.submit(str(len(prompt)), prompt, params)
        for prompt in prompts:
            recorder.end(str(len(prompt)))
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 30, "eos_token_id": None, "do_sample": False, "repetition_penalty": penalty}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
        assert recorder.tokens(str(len(prompt))) == expected[0, len(prompt) :].tolist()
        events = recorder.events[str(len(prompt))]
        assert [len(event.logprobs) for event in events] == [len(event.token_ids) for event in events]
