from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from service.engine.penalties import Adjuster
from service.engine.sequence import SamplingParams, Sequence

VOCAB_SIZE = 97
PROMPT = [5, 6, 5, 7, 96]
TEXT = [8, 5, 8, 8, 0, 9, 10, 11, 12, 13, 14]


def make_sequence(name: str, text: list[int], **params: Any) -> Sequence:
    return Sequence(
        request_id=name,
        token_ids=[*PROMPT, *text],
        num_prompt_tokens=len(PROMPT),
        params=SamplingParams(max_tokens=99, **params),
        submitted_at=0,
    )


def make_logits(rows: int = 1) -> Tensor:
    return 3 * torch.randn((rows, VOCAB_SIZE), generator=torch.Generator().manual_seed(rows))


def adjusted(logits: Tensor, *sequences: Sequence) -> Tensor:
    logits = logits.clone()
    Adjuster().apply(logits, sequences)
    return logits


def oracle(logits: Tensor, sequence: Sequence) -> Tensor:
    """By transformers' processors; it has none for counts, so these follow OpenAI's definition."""
    params, ids = sequence.params, torch.tensor([sequence.token_ids])
    scores: Any = logits[None]
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    text = sequence.token_ids[sequence.num_prompt_tokens :]
    counts = torch.tensor([text.count(i) for i in range(VOCAB_SIZE)])
    scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if params.logit_bias:
        biases: Any = {(token_id,): value for token_id, value in params.logit_bias}
        scores = SequenceBiasLogitsProcessor(biases)(ids, scores)
    if params.stop_token_ids:
        stops = list(params.stop_token_ids)
        banning = MinNewTokensLengthLogitsProcessor(sequence.num_prompt_tokens, params.min_tokens, stops)
        scores = banning(ids, scores)
    first: Tensor = scores[0]
    return first


PARAMS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "encouraged-repetition": {"repetition_penalty": 0.1},
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": -2.0},
    "all-penalties": {"repetition_penalty": 10.0, "frequency_penalty": -2.0, "presence_penalty": 1.5},
    "bias": {"logit_bias": ((8, 100.0), (1, -100.0), (96, 0.5))},
    "banned": {"min_tokens": 12, "stop_token_ids": frozenset({8, 96})},
    "no-longer-banned": {"min_tokens": 11, "stop_token_ids": frozenset({8, 96})},
    "everything": {
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "logit_bias": ((8, 50.0), (3, 1.0)),
        "min_tokens": 20,
        "stop_token_ids": frozenset({3}),
    },
}


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("text", [[], TEXT], ids=["first", "later"])
def test_logits_equal_those_of_transformers_processors(name: str, text: list[int]) -> None:
    sequence = make_sequence("a", text, **PARAMS[name])
    logits = make_logits()
    # Each of at most 4 operations rounds by 2^-24 of a logit; they are below 210, with the bias.
    torch.testing.assert_close(
        adjusted(logits, sequence)[0], oracle(logits[0], sequence), rtol=2**-20, atol=210 * 2**-22
    )


def test_rows_are_adjusted_together_as_alone() -> None:
    sequences = [make_sequence(name, TEXT, **params) for name, params in PARAMS.items()]
    sequences.insert(3, make_sequence("plain", TEXT))
    logits = make_logits(len(sequences))
    together = adjusted(logits, *sequences)
    assert torch.equal(together[3], logits[3])
    for row, sequence in enumerate(sequences):
        assert torch.equal(together[row], adjusted(logits[row : row + 1], sequence)[0])


def test_a_history_that_grows_is_one_read_at_once() -> None:
    params = PARAMS["everything"]
    adjuster, growing = Adjuster(), make_sequence("a", [], **params)
    for token_id in [*TEXT, *range(20, 60), *TEXT]:
        growing.token_ids.append(token_id)
        logits = make_logits()
        adjuster.apply(logits, [growing])
        at_once = make_sequence("b", growing.token_ids[len(PROMPT) :], **params)
        assert torch.equal(logits, adjusted(make_logits(), at_once))


def test_a_sequence_that_is_forgotten_leaves_nothing_to_the_next_of_its_name() -> None:
    adjuster = Adjuster()
    adjuster.apply(make_logits(), [make_sequence("a", TEXT, **PARAMS["everything"])])
    adjuster.forget("a")
    adjuster.forget("never seen")
    logits, other = make_logits(), make_sequence("a", [40], repetition_penalty=2.0, logit_bias=((1, 1.0),))
    adjuster.apply(logits, [other])
    assert torch.equal(logits, adjusted(make_logits(), other))


def test_a_stop_token_that_the_model_does_not_have_is_passed_over() -> None:
    sequence = make_sequence("a", [], min_tokens=1, stop_token_ids=frozenset({VOCAB_SIZE, 3}))
    expected = make_logits()
    expected[0, 3] = -torch.inf
    assert torch.equal(adjusted(make_logits(), sequence), expected)
