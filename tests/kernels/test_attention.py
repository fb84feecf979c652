"""Native attention against float64, with a bound that follows from the arithmetic, on every instruction set here.

In float32 a score of `size` products is off by at most `size + 2` roundings of the sum of their magnitudes, which the
queries and keys of these tests keep below 2 * size * scaling. A weight is off by as much, and by the exponential's
1.5e-7; a mean with such weights by twice that of the largest value. In bfloat16 only the result is rounded once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.engine.kv_stores import encode
from service.kernels import dispatch
from service.kernels.native_attention import Attention, Stored
from tests.kernels.support import computing_with

ISAS = [isa for isa in dispatch.ISAS if isa != "torch" and not dispatch.obstacle(isa)]
BLOCK_SIZE, NUM_BLOCKS = 16, 40
EPSILON, EXPONENTIAL_ERROR = 2.0**-24, 1.5e-7


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with computing_with(request.param):
        yield request.param


@dataclass(slots=True)
class Case:
    """Queries and what they attend to; keys, values and queries are at most 1 in magnitude."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor
    how: Attention

    def stored(self, *, as_int8: bool = False) -> tuple[Stored, Stored]:
        if as_int8:
            keys, values = (Stored(*encode(rows)) for rows in (self.keys, self.values))
            return keys, values
        return Stored(self.keys), Stored(self.values)

    def attend(self, stored: tuple[Stored, Stored] | None = None) -> Tensor:
        out = dispatch.attend(
            self.queries, *(stored or self.stored()), tables=self.tables, lengths=self.lengths, how=self.how
        )
        assert out is not None
        return out

    def expected(self, stored: tuple[Stored, Stored] | None = None) -> Tensor:
        """In float64, one sequence after the other."""
        keys, values = (decoded(each) for each in stored or self.stored())
        repeats = self.queries.shape[1] // keys.shape[2]
        rows = []
        for query, table, length in zip(self.queries.double(), self.tables, self.lengths.tolist(), strict=True):
            first = max(0, length - self.how.sliding_window) if self.how.sliding_window else 0
            own_keys, own_values = (
                each[table].flatten(0, 1)[first:length].repeat_interleave(repeats, 1) for each in (keys, values)
            )
            scores = torch.einsum("hd,nhd->hn", query, own_keys) * self.how.scaling
            if self.how.softcap is not None:
                scores = torch.tanh(scores / self.how.softcap) * self.how.softcap
            if self.how.sinks is not None:
                scores = torch.cat([scores, self.how.sinks.double()[:, None]], dim=1)
            weights = scores.softmax(1)[:, : length - first]
            rows.append(torch.einsum("hn,nhd->hd", weights, own_values))
        return torch.stack(rows)

    def bound(self) -> float:
        size = self.queries.shape[2]
        of_scores = (size + 4) * EPSILON * size * self.how.scaling
        bound = 2 * (of_scores + EXPONENTIAL_ERROR + (int(self.lengths.max()) + 4) * EPSILON)
        return bound + (2.0**-9 if self.queries.dtype == torch.bfloat16 else 0)


def decoded(stored: Stored) -> Tensor:
    rows = stored.rows.double()
    return rows if stored.scales is None else rows * stored.scales.double()


def make_case(
    kv_heads: int = 3,
    repeats: int = 3,
    sizes: tuple[int, int] = (64, 64),
    lengths: tuple[int, ...] = (1, 17, 33, 100, 64),
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    has_sinks: bool = False,
    **how: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1).to(dtype)

    width = -(-max(lengths) // BLOCK_SIZE)
    tables = torch.stack([torch.randperm(NUM_BLOCKS, generator=generator)[:width] for _ in lengths])
    sinks = 2 * draw(kv_heads * repeats) if has_sinks else None
    return Case(
        draw(len(lengths), kv_heads * repeats, sizes[0]),
        draw(NUM_BLOCKS, BLOCK_SIZE, kv_heads, sizes[0]),
        draw(NUM_BLOCKS, BLOCK_SIZE, kv_heads, sizes[1]),
        tables,
        torch.tensor(lengths),
        Attention(scaling=sizes[0] ** -0.5, sinks=sinks, **how),
    )


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 7},
    "wide-window": {"sliding_window": 40},
    "softcap": {"softcap": 0.5},
    "sinks": {"has_sinks": True},
    "all": {"sliding_window": 20, "softcap": 2.0, "has_sinks": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("as_int8", [False, True], ids=["plain", "int8"])
def test_every_query_sees_the_tokens_of_its_own_sequence(
    dtype: torch.dtype, how: dict[str, Any], *, as_int8: bool
) -> None:
    case = make_case(dtype=dtype, **how)
    stored = case.stored(as_int8=as_int8)
    assert (case.attend(stored).double() - case.expected(stored)).abs().max() <= case.bound()


@given(
    kv_heads=st.integers(1, 3),
    repeats=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=5).map(tuple),
    window=st.one_of(st.none(), st.integers(1, 220)),
    seed=st.integers(0, 2**32),
)
def test_sizes_and_lengths_of_any_kind_are_right(
    kv_heads: int, repeats: int, sizes: tuple[int, int], lengths: tuple[int, ...], window: int | None, seed: int
) -> None:
    case = make_case(kv_heads, repeats, sizes, lengths, seed=seed, sliding_window=window)
    assert (case.attend().double() - case.expected()).abs().max() <= case.bound()


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    case = make_case()
    case.how = case.how._replace(scaling=100.0)
    assert (case.attend().double() - case.expected()).abs().max() <= case.bound()


def test_a_row_gives_the_same_bits_whatever_the_others_are() -> None:
    case = make_case(dtype=torch.bfloat16)
    together = case.attend()
    for row in range(len(case.lengths)):
        own = slice(row, row + 1)
        alone = Case(case.queries[own], case.keys, case.values, case.tables[own], case.lengths[own], case.how)
        assert torch.equal(alone.attend()[0], together[row])


def test_the_number_of_threads_changes_no_bit() -> None:
    case = make_case(kv_heads=4, lengths=(500, 300, 620))
    found = []
    for num_threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            found.append(case.attend())
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["queries", "keys", "values"])
def test_what_is_not_finite_stays_in_its_row(where: str, value: float) -> None:
    case = make_case()
    if where == "queries":
        case.queries[3, :, 5] = value
    else:
        getattr(case, where)[case.tables[3, 4], 2] = value
        for row in (0, 1, 2, 4):  # nobody else has that block
            case.tables[row][case.tables[row] == case.tables[3, 4]] = (case.tables[3, 4] + 1) % NUM_BLOCKS
    found = case.attend()
    assert not found[3].isfinite().all()
    assert found[[0, 1, 2, 4]].isfinite().all()


def test_a_sink_that_is_not_finite_gives_nan_but_for_minus_infinity() -> None:
    case = make_case(has_sinks=True)
    assert case.how.sinks is not None
    case.how.sinks[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found = case.attend()
    assert found[:, :2].isnan().all()
    assert (found[:, 2:].double() - case.expected()[:, 2:]).abs().max() <= case.bound()


def test_an_infinite_score_under_a_cap_is_the_cap() -> None:
    case = make_case(sizes=(1, 8), softcap=2.0)
    large = replace(case, how=case.how._replace(scaling=1e9))  # beyond it by far
    infinite = replace(case, queries=torch.inf * case.queries)
    assert torch.equal(infinite.attend(), large.attend())


@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
def test_a_scale_that_is_nan_stays_in_its_row(part: int) -> None:
    case = make_case()
    stored = case.stored(as_int8=True)
    scales = stored[part].scales
    assert scales is not None
    case.tables[2] = torch.arange(33, 33 + case.tables.shape[1])  # a row with blocks of its own
    for row in (0, 1, 3, 4):
        case.tables[row] %= 33
    scales[33, 4] = torch.nan
    found = case.attend(stored)
    assert found[2].isnan().all()
    assert found[[0, 1, 3, 4]].isfinite().all()


def test_slots_behind_the_last_token_are_never_used() -> None:
    case = make_case(lengths=(5,))
    case.keys[case.tables[0, 0], 5:] = torch.nan
    case.values[case.tables[0, 0], 5:] = torch.nan
    assert case.attend().isfinite().all()


def test_torch_attends_what_the_library_does_not_take() -> None:
    case = make_case(dtype=torch.float16)
    assert _attended(case) is None
    case = make_case()
    assert _attended(case) is not None
    with computing_with("torch"):
        assert _attended(case) is None


def _attended(case: Case) -> Tensor | None:
    return dispatch.attend(case.queries, *case.stored(), tables=case.tables, lengths=case.lengths, how=case.how)
