"""Native attention against float64, with a bound that follows from the arithmetic, on every instruction set here.

In float32 a score of `size` products is off by at most `size + 2` roundings of the sum of their magnitudes, which the
queries and keys of these tests keep below 2 * size * scaling. A weight is off by as much, and by the exponential's
1.5e-7; a mean with such weights by twice that of the largest value. In bfloat16 the result is rounded once more, by
2^-9 as it is below 1; where several tokens of a sequence attend, weights are too, by 2^-8 of themselves, and their
exponentials are off by 2.7e-6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.engine.kv_stores import encode
from service.kernels import dispatch
from service.kernels.native_attention import Attention, Rows, Stored
from tests.kernels.support import computing_with

ISAS = [isa for isa in dispatch.ISAS if isa != "torch" and not dispatch.obstacle(isa)]
BLOCK_SIZE, NUM_BLOCKS = 16, 40
EPSILON, EXPONENTIAL_ERROR = 2.0**-24, 1.5e-7
ROWS = ((1, 1), (17, 1), (33, 33), (100, 1), (64, 64), (150, 5), (133, 40), (2, 2))
"""Single tokens, whole prompts and parts of them; tiles are of 64 tokens."""


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
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    how: Attention

    def stored(self, *, as_int8: bool = False) -> tuple[Stored, Stored]:
        if as_int8:
            keys, values = (Stored(*encode(rows)) for rows in (self.keys, self.values))
            return keys, values
        return Stored(self.keys), Stored(self.values)

    def attend_or_not(self, stored: tuple[Stored, Stored] | None = None) -> Tensor | None:
        num_rows, width = self.tables.shape
        starts = torch.arange(num_rows + 1) * width
        rows = Rows(self.tables.flatten(), starts, torch.tensor(self.lengths), torch.tensor(self.counts))
        return dispatch.attend(self.queries, *(stored or self.stored()), rows, how=self.how)

    def attend(self, stored: tuple[Stored, Stored] | None = None) -> Tensor:
        out = self.attend_or_not(stored)
        assert out is not None
        return out

    def attend_by_rows(self, stored: tuple[Stored, Stored] | None = None) -> list[Tensor]:
        return list(torch.split(self.attend(stored), list(self.counts)))

    def alone(self, row: int, *, first: int = 0, last: int | None = None) -> Case:
        """Tokens `first .. last - 1` of those of a row that attend, and nobody else."""
        last = self.counts[row] if last is None else last
        length = self.lengths[row] - self.counts[row] + last
        queries = torch.split(self.queries, list(self.counts))[row][first:last]
        return replace(
            self, queries=queries, tables=self.tables[row : row + 1], lengths=(length,), counts=(last - first,)
        )

    def expected(self, stored: tuple[Stored, Stored] | None = None) -> Tensor:
        """In float64, one sequence after the other."""
        keys, values = (decoded(each) for each in stored or self.stored())
        repeats = self.queries.shape[1] // keys.shape[2]
        out = []
        for queries, table, length in zip(
            torch.split(self.queries.double(), list(self.counts)), self.tables, self.lengths, strict=True
        ):
            own_keys, own_values = (
                each[table].flatten(0, 1)[:length].repeat_interleave(repeats, 1) for each in (keys, values)
            )
            scores = torch.einsum("qhd,nhd->qhn", queries, own_keys) * self.how.scaling
            if self.how.softcap is not None:
                scores = torch.tanh(scores / self.how.softcap) * self.how.softcap
            is_seen = torch.ones(len(queries), length, dtype=torch.bool).tril(length - len(queries))
            if self.how.sliding_window is not None:
                is_seen = is_seen.triu(length - len(queries) - self.how.sliding_window + 1)
            scores.masked_fill_(~is_seen[:, None], -torch.inf)
            if self.how.sinks is not None:
                sinks = self.how.sinks.double()[None, :, None].expand(len(queries), -1, 1)
                scores = torch.cat([scores, sinks], dim=2)
            out.append(torch.einsum("qhn,nhd->qhd", scores.softmax(2)[:, :, :length], own_values))
        return torch.cat(out)

    def bound(self) -> float:
        size = self.queries.shape[2]
        of_scores = (size + 4) * EPSILON * size * abs(self.how.scaling)
        bound = 2 * (of_scores + EXPONENTIAL_ERROR + (max(self.lengths) + 4) * EPSILON)
        if self.queries.dtype == torch.float32:
            return bound
        of_weights = 2.0**-8 + 2 * 2.7e-6 if max(self.counts) > 1 else 0
        return bound + 2.0**-9 + of_weights


def decoded(stored: Stored) -> Tensor:
    rows = stored.rows.double()
    return rows if stored.scales is None else rows * stored.scales.double()


def make_case(
    kv_heads: int = 3,
    repeats: int = 3,
    sizes: tuple[int, int] = (64, 64),
    rows: Sequence[tuple[int, int]] = ROWS,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    has_sinks: bool = False,
    **how: Any,
) -> Case:
    """`rows`: tokens of each sequence, and how many of them attend."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1).to(dtype)

    lengths, counts = zip(*rows, strict=True)
    width = -(-max(lengths) // BLOCK_SIZE)
    tables = torch.stack([torch.randperm(NUM_BLOCKS, generator=generator)[:width] for _ in rows])
    sinks = 2 * draw(kv_heads * repeats) if has_sinks else None
    return Case(
        draw(sum(counts), kv_heads * repeats, sizes[0]),
        draw(NUM_BLOCKS, BLOCK_SIZE, kv_heads, sizes[0]),
        draw(NUM_BLOCKS, BLOCK_SIZE, kv_heads, sizes[1]),
        tables,
        lengths,
        counts,
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
    rows=st.lists(
        st.integers(1, 200).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, min(length, 50)))),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.one_of(st.none(), st.integers(1, 220)),
    as_int8=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_sizes_and_lengths_of_any_kind_are_right(
    kv_heads: int,
    repeats: int,
    sizes: tuple[int, int],
    rows: list[tuple[int, int]],
    dtype: torch.dtype,
    window: int | None,
    *,
    as_int8: bool,
    seed: int,
) -> None:
    case = make_case(kv_heads, repeats, sizes, rows, dtype, seed=seed, sliding_window=window)
    stored = case.stored(as_int8=as_int8)
    assert (case.attend(stored).double() - case.expected(stored)).abs().max() <= case.bound()


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    case = make_case()
    case.how = case.how._replace(scaling=100.0)
    assert (case.attend().double() - case.expected()).abs().max() <= case.bound()


@pytest.mark.parametrize("step", [0.02, 0.5, -0.5], ids=["slowly", "fast", "down"])
def test_scores_that_rise_or_fall_from_token_to_token_are_right(step: float) -> None:
    """By 3, by 80 or by -80 over the sequence: what weights are relative to changes never, often, or never."""
    case = make_case(kv_heads=1, sizes=(1, 8), rows=[(160, 1), (160, 100)])
    case.queries.fill_(1)
    case.tables[1] = case.tables[0]
    case.keys[case.tables[0]] = torch.arange(160.0).view(-1, BLOCK_SIZE, 1, 1) / 160
    case.how = case.how._replace(scaling=160 * step)
    assert (case.attend().double() - case.expected()).abs().max() <= case.bound()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_gives_the_same_bits_whatever_the_others_are(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    for row, together in enumerate(case.attend_by_rows()):
        assert torch.equal(case.alone(row).attend(), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [HOW["plain"], HOW["all"]], ids=["plain", "all"])
def test_several_tokens_give_the_same_bits_however_they_are_cut(dtype: torch.dtype, how: dict[str, Any]) -> None:
    case = make_case(rows=[(150, 100)], dtype=dtype, **how)
    cuts = [0, 2, 9, 41, 43, 100]
    parts = [case.alone(0, first=first, last=last).attend() for first, last in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), case.attend())


def test_the_number_of_threads_changes_no_bit() -> None:
    case = make_case(kv_heads=4, rows=[(500, 1), (300, 1), (620, 90), (301, 301)])
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
@pytest.mark.parametrize("row", [3, 5], ids=["single", "several"])
def test_what_is_not_finite_stays_in_its_row(row: int, where: str, value: float) -> None:
    case = make_case()
    if where == "queries":
        case.queries[sum(case.counts[: row + 1]) - 1, :, 5] = value
    else:
        own = case.tables[row, 4]
        getattr(case, where)[own, 2] = value
        for table in (*case.tables[:row], *case.tables[row + 1 :]):  # nobody else has that block
            table[table == own] = (own + 1) % NUM_BLOCKS
    found = case.attend_by_rows()
    assert not found.pop(row)[-1].isfinite().any(-1).all()
    assert torch.cat(found).isfinite().all()


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
@pytest.mark.parametrize("row", [3, 5], ids=["single", "several"])
def test_a_scale_that_is_nan_stays_in_its_row(row: int, part: int) -> None:
    case = make_case()
    stored = case.stored(as_int8=True)
    scales = stored[part].scales
    assert scales is not None
    case.tables %= NUM_BLOCKS - case.tables.shape[1]
    case.tables[row] = torch.arange(NUM_BLOCKS - case.tables.shape[1], NUM_BLOCKS)  # blocks of its own
    scales[case.tables[row, 0], 4] = torch.nan
    found = case.attend_by_rows(stored)
    assert found.pop(row).isnan().all()
    assert torch.cat(found).isfinite().all()


@pytest.mark.parametrize("as_int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("count", [1, 3], ids=["single", "several"])
def test_slots_behind_the_last_token_are_never_used(count: int, *, as_int8: bool) -> None:
    case = make_case(rows=[(69, count)])
    for rows in (case.keys, case.values):
        rows[case.tables[0, 4], 5:] = torch.nan
    assert case.attend(case.stored(as_int8=as_int8)).isfinite().all()


@pytest.mark.parametrize("count", [1, 3], ids=["single", "several"])
def test_tokens_that_no_query_sees_are_never_used(count: int) -> None:
    case = make_case(rows=[(90, count)], sliding_window=10)
    first = 90 - count + 1 - 10
    for rows in (case.keys, case.values):
        for place in range(first):
            rows[case.tables[0, place // BLOCK_SIZE], place % BLOCK_SIZE] = torch.nan
    assert case.attend().isfinite().all()


def test_torch_attends_what_the_library_does_not_take() -> None:
    assert make_case(dtype=torch.float16).attend_or_not() is None
    case = make_case()
    assert case.attend_or_not() is not None
    with computing_with("torch"):
        assert case.attend_or_not() is None
