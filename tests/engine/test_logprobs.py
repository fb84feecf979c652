from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from service.engine.logprobs import read_logprobs
from tests.kernels.support import computing_with


@pytest.fixture(params=["auto", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """They are read natively, where the library is there, and by torch."""
    with computing_with(request.param):
        yield


@pytest.mark.parametrize("vocab_size", [5, 300, 3001])
@pytest.mark.parametrize("most", [20, 1000])  # more than the kernels take
def test_they_are_those_of_a_log_softmax_in_float64(vocab_size: int, most: int) -> None:
    logits = 4 * torch.randn((4, vocab_size), generator=torch.Generator().manual_seed(vocab_size))
    counts, tokens = [0, 1, 5, most], [0, 4, 2, 3]
    expected = logits.double().log_softmax(1)
    for row, found in enumerate(read_logprobs(logits, tokens, counts)):
        values, ids = expected[row].topk(min(counts[row], vocab_size))
        assert [token_id for token_id, _ in found.top] == ids.tolist()
        # The sum of exponentials and the logits, at most 20, round to float32.
        assert found.logprob == pytest.approx(expected[row, tokens[row]].item(), abs=20 * 2**-22)
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=20 * 2**-22)


def test_of_equally_likely_tokens_the_lower_id_comes_first() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, [4000, 17, 900]] = 1.0
    (found,) = read_logprobs(logits, [4999], [3])
    assert [token_id for token_id, _ in found.top] == [17, 900, 4000]


def test_a_token_without_probability_has_minus_infinity() -> None:
    (found,) = read_logprobs(torch.tensor([[0.0, -torch.inf]]), [1], [2])
    assert found.logprob == -torch.inf
    assert found.top == ((0, 0.0), (1, -torch.inf))
