"""Native choice of tokens against sorts and sums of rows in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from service.kernels import dispatch, native, native_sampling
from service.kernels.native import Library
from service.kernels.native_sampling import Draw
from tests.kernels.support import computing_with

LIBRARY = native.load().library
ISAS = [] if LIBRARY is None else [isa for isa in LIBRARY.isas if not LIBRARY.obstacle(isa)]
TINY = 2.0**-126
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=native.load().obstacle)

Floats = NDArray[np.float64]


@pytest.fixture
def library() -> Library:
    assert LIBRARY is not None
    return LIBRARY


@pytest.fixture(params=ISAS, scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, one after another."""
    name: str = request.param
    with computing_with(name):
        yield name


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Case:
    """A row of logits, a draw from it, and how many tokens it has."""

    logits: Tensor
    draw: Draw

    def distances(self) -> Floats:
        """From the peak in units of the temperature, rounded to float32 at each step as the library does."""
        row = self.logits[0].numpy()
        with np.errstate(over="ignore"):
            found: Floats = ((row.max() - row) * np.float32(self.draw.inverse_temperature)).astype(np.float64)
        return found


def weights_of(case: Case, slack: float) -> Floats:
    """Weights float64[vocab] of what is kept, with the edges of top_p and min_p moved outwards by `slack`."""
    distances, draw = case.distances(), case.draw
    weights: Floats = np.exp(-distances)
    order = np.argsort(distances, kind="stable")
    kept = np.zeros(len(weights), dtype=bool)
    num_kept = len(order)
    if draw.top_k:
        num_kept = int(np.searchsorted(distances[order], distances[order][min(draw.top_k, num_kept) - 1], "right"))
    inner = order[:num_kept]
    before = np.cumsum(weights[inner]) - weights[inner]
    is_in_p = before < draw.top_p * weights[inner].sum() * (1 + slack) if draw.top_p < 1 else np.full(num_kept, True)
    is_in_p[0] = True
    kept[inner[is_in_p]] = True
    kept &= (weights >= np.float32(draw.min_p) * (1 - slack)) | (distances == 0)
    return np.where(kept, weights, 0)


SLACK = 2.0**-20
"""Of shares: sums of weights that are off by 2^-23 of themselves and sums of four of them in float32."""


def assert_drawn(case: Case, token: int) -> None:
    """A token that is kept lies where its cumulative weights pass the uniform number, within the edges' slack."""
    most, least = weights_of(case, SLACK), weights_of(case, -SLACK)
    assert most[token] > 0
    # What is kept lies between both, so sums up to the token do, and so does the whole.
    lowest = least[:token].sum() / most.sum()
    highest = most[: token + 1].sum() / least.sum()
    assert lowest - SLACK <= case.draw.uniform <= highest + SLACK


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.one_of(st.sampled_from([1, 2, 15, 16, 17, 1023, 1024, 1025, 4999, 5000]), st.integers(1, 5000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(1, size, generator=generator) * draw(st.sampled_from([0, 0.01, 1, 4, 30, 1e5]))
    kind = draw(st.sampled_from(["as they are", "ties", "ruled out", "one left"]))
    if kind == "ties":
        logits = logits.round()
    elif kind == "ruled out":
        logits[torch.rand(1, size, generator=generator) < draw(st.floats(0, 1))] = -math.inf
        logits[0, draw(st.integers(0, size - 1))] = 0.5
    elif kind == "one left":
        logits[:] = -math.inf
        logits[0, draw(st.integers(0, size - 1))] = draw(st.sampled_from([-1e38, 0.0, 1e38]))
    return Case(
        logits,
        Draw(
            row=0,
            top_k=draw(st.one_of(st.just(0), st.integers(0, 100), st.integers(0, 6000))),
            inverse_temperature=draw(st.sampled_from([0.5, 1.0, 1 / 0.7, 3.0, 1e3, 1e30, 1 / TINY, 1e-3, 1e-30])),
            top_p=draw(
                st.one_of(st.just(1.0), st.floats(0, 1, exclude_min=True), st.sampled_from([1e-30, 1 - 2**-53]))
            ),
            min_p=draw(st.one_of(st.sampled_from([0.0, 1.0, 1e-4, 1e-40]), st.floats(0, 1))),
            uniform=draw(st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53]))),
        ),
    )


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_a_token_is_drawn_as_by_a_sort_of_the_whole_row(isa: str, case: Case) -> None:
    assert LIBRARY is not None
    (token,) = native_sampling.draw(LIBRARY, case.logits, [case.draw])
    assert_drawn(case, token)


def test_a_draw_of_another_token_would_be_noticed(library: Library) -> None:
    case = Case(normal(1, 5000), Draw(0, 100, 1.0, 0.9, 0.01, 0.4))
    (token,) = native_sampling.draw(library, case.logits, [case.draw])
    kept = weights_of(case, 0).nonzero()[0]
    place = int(np.searchsorted(kept, token))
    for other in (kept[place - 2], kept[place + 2], int(kept[0]) + 1):
        with pytest.raises(AssertionError):
            assert_drawn(case, int(other))


@pytest.mark.parametrize("limits", [(0, 0.9, 0.0), (1000, 1.0, 0.0), (0, 1.0, 0.001), (700, 0.8, 0.01)], ids=str)
@pytest.mark.parametrize("decimals", [1, 7], ids=["ties", "no-ties"])
def test_just_the_tokens_within_the_limits_are_drawn(
    library: Library, isa: str, limits: tuple[int, float, float], decimals: int
) -> None:
    logits = normal(1, 5003, scale=2.0).round(decimals=decimals)
    top_k, top_p, min_p = limits
    draw = Draw(0, top_k, 1.0, top_p, min_p, 0.0)
    weights = weights_of(Case(logits, draw), 0)
    inner = (np.cumsum(weights) - weights / 2) / weights.sum()
    kept = weights.nonzero()[0].tolist()
    found = native_sampling.draw(library, logits, [draw._replace(uniform=float(inner[token])) for token in kept])
    assert found == kept, isa


@pytest.mark.parametrize("vocab_size", [1, 2, 16, 1023, 1024, 1025, 49152])
def test_the_peak_is_the_first_of_the_largest(library: Library, isa: str, vocab_size: int) -> None:
    logits = torch.cat([normal(3, vocab_size), normal(3, vocab_size).round()])
    logits[0] = -math.inf
    logits[0, -1] = -1e38
    peaks, tokens = native_sampling.find_peaks(library, logits)
    assert tokens == [row.index(max(row)) for row in logits.tolist()], isa
    assert peaks == logits.amax(1).tolist()


@pytest.mark.parametrize("place", [0, 1, 500, 1023, 1024, 2999])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_row_that_cannot_be_used_is_told_from_its_neighbours(
    library: Library, isa: str, place: int, value: float
) -> None:
    logits = normal(3, 3000)
    expected = native_sampling.find_peaks(library, logits)
    draws = [Draw(row, 0, 1.0, 0.9, 0.0, 0.5) for row in range(3)]
    drawn = native_sampling.draw(library, logits, draws)
    logits[1, place] = value
    peaks, tokens = native_sampling.find_peaks(library, logits)
    assert [peaks[0], peaks[2], tokens[0], tokens[2]] == [expected[i][row] for i in (0, 1) for row in (0, 2)], isa
    assert not math.isfinite(peaks[1])
    assert math.isnan(peaks[1]) == math.isnan(value)
    assert native_sampling.draw(library, logits, draws) == [drawn[0], -1, drawn[2]]
    own, _, values = native_sampling.read_logprobs(library, logits, [0, 0, 0], 2)
    assert [math.isnan(each) for each in (*own, *values[1])] == [False, True, False, True, True]


@pytest.mark.parametrize("vocab_size", [1, 5, 300, 1024, 3001, 49152])
@pytest.mark.parametrize("count", [0, 1, 20, native_sampling.MAX_LOGPROBS])
def test_logprobs_are_those_of_a_log_softmax_in_float64(
    library: Library, isa: str, vocab_size: int, count: int
) -> None:
    count = min(count, vocab_size)
    logits = torch.cat([normal(2, vocab_size, scale=4.0), normal(1, vocab_size).round()])
    if vocab_size > 1:
        logits[1, 1::2] = -math.inf
    tokens = [0, vocab_size // 2, vocab_size - 1]
    own, ids, values = native_sampling.read_logprobs(library, logits, tokens, count)
    expected = logits.double().log_softmax(1)
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.tensor(ids).view(3, count).equal(order), isa
    # The largest distance, 35, is rounded by 2^-24 of itself, and each weight by less than 2^-23.
    atol = 2.0**-19
    wanted = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(own, dtype=torch.float64), wanted, rtol=0, atol=atol)
    found = torch.tensor(values, dtype=torch.float64).view(3, count)
    torch.testing.assert_close(found, expected.gather(1, order), rtol=0, atol=atol)


def results(library: Library, logits: Tensor) -> tuple[object, ...]:
    limits = [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.001), (1000, 0.9, 0.01)]
    uniforms = torch.rand(len(logits), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    draws = [
        Draw(row, top_k, 1 / (0.5 + row % 3), top_p, min_p, uniforms[row])
        for row in range(len(logits))
        for top_k, top_p, min_p in limits
    ]
    tokens = list(range(len(logits)))
    return (
        *native_sampling.find_peaks(library, logits),
        native_sampling.draw(library, logits, draws),
        *native_sampling.read_logprobs(library, logits, tokens, 20),
    )


def test_results_are_the_same_for_any_number_of_threads_and_any_neighbours(library: Library, isa: str) -> None:
    logits, before = normal(21, 5003, scale=3.0), torch.get_num_threads()
    uniforms = torch.linspace(0, 0.999, 21, dtype=torch.float64).tolist()
    draws = [Draw(row, 0, 1.0, 0.9, 0.0, uniforms[row]) for row in range(21)]
    alone = [native_sampling.draw(library, logits[row : row + 1], [draws[row]._replace(row=0)]) for row in range(21)]
    try:
        torch.set_num_threads(2)
        by_two = results(library, logits)
        assert [[token] for token in native_sampling.draw(library, logits, draws)] == alone
        torch.set_num_threads(1)
        assert results(library, logits) == by_two, isa
    finally:
        torch.set_num_threads(before)


def test_results_are_the_same_for_all_instruction_sets_that_multiply_and_add_at_once(library: Library) -> None:
    logits = normal(16, 5003, scale=3.0)
    found = []
    for name in ISAS:
        if name != "baseline":
            with computing_with(name):
                found.append(results(library, logits))
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize(
    ("logits", "is_taken"),
    [
        (torch.zeros(2, 5), True),
        (torch.zeros(2, 5).bfloat16(), False),
        (torch.zeros(5, 2).t(), False),
        (torch.zeros(2, 10)[:, :5], False),
        (torch.zeros(0, 5), False),
        (torch.zeros(2, 0), False),
        (torch.zeros(5), False),
        (torch.zeros(2, 5, device="meta"), False),
    ],
    ids=["float32", "bfloat16", "transposed", "strided", "no-rows", "no-tokens", "a-vector", "elsewhere"],
)
def test_logits_that_the_library_cannot_read_are_left_to_torch(logits: Tensor, is_taken: bool) -> None:
    assert (dispatch.sampling_library(logits) is not None) == is_taken
    with computing_with("torch"):
        assert dispatch.sampling_library(logits) is None


@pytest.mark.parametrize(
    "wrong",
    [{"row": 2}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": math.nan}, {"min_p": 1.1}, {"uniform": 1.0}],
    ids=str,
)
def test_a_draw_with_wrong_arguments_is_refused(library: Library, wrong: dict[str, float]) -> None:
    right = Draw(1, 0, 1.0, 1.0, 0.0, 0.5)
    logits = torch.tensor([[0.0, 1.0, -math.inf], [-math.inf, 0.0, -math.inf]])
    assert native_sampling.draw(library, logits, [right]) == [1]
    with pytest.raises(RuntimeError, match="ended a call with status 1"):
        native_sampling.draw(library, logits, [right._replace(**wrong)])  # type: ignore[arg-type]
