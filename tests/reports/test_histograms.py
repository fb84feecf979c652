"""Histograms whose range grows, against numpy's of all values at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from service.reports.histograms import NUM_BINS, Histogram


def values(num: int, *, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed)) * scale


def histogram(*pieces: Tensor) -> Histogram:
    counted = Histogram()
    for piece in pieces:
        counted.add(piece)
    return counted


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 3.7, 1e20])
def test_counts_are_numpys(scale: float) -> None:
    piece = values(5000, scale=scale)
    counted = histogram(piece)
    largest = float(piece.abs().max())
    assert 2.0 ** (counted.exponent - 1) < largest <= 2.0**counted.exponent
    counts, edges = np.histogram(
        piece.double().numpy(), bins=NUM_BINS, range=(-(2.0**counted.exponent), 2.0**counted.exponent)
    )
    assert counted.counts.tolist() == counts.tolist()
    np.testing.assert_allclose(counted.edges, edges, rtol=1e-12)


def test_pieces_in_any_order_and_shape_give_the_same_counts() -> None:
    pieces = [values(1000, scale=scale, seed=i) for i, scale in enumerate((0.01, 5.0, 1e-12, 0.3))]
    whole = histogram(torch.cat(pieces))
    for order in (pieces, pieces[::-1], [piece.view(10, 100).t() for piece in pieces]):
        counted = histogram(*order)
        assert (counted.exponent, counted.counts.tolist()) == (whole.exponent, whole.counts.tolist())


def test_merged_histograms_are_those_of_all_values() -> None:
    pieces = [values(1000, scale=scale, seed=i) for i, scale in enumerate((0.01, 5.0, 0.3))]
    merged = Histogram()
    for piece in pieces:
        other = histogram(piece)
        before = other.counts.tolist()
        merged.merge(other)
        assert other.counts.tolist() == before
    assert merged.counts.tolist() == histogram(torch.cat(pieces)).counts.tolist()


@pytest.mark.parametrize("value", [1.0, -1.0, 0.5, 2.0**-149, 3.0e38])
def test_a_value_at_the_edge_of_the_range_is_in_its_last_bin(value: float) -> None:
    counted = histogram(torch.tensor([value]))
    assert counted.counts.sum() == 1
    is_power = math.frexp(abs(value))[0] == 0.5
    assert counted.counts[-1 if value > 0 else 0] == is_power


def test_zeros_are_in_the_middle_whatever_comes_later() -> None:
    counted = histogram(torch.zeros(7), torch.tensor([100.0]))
    assert counted.counts[NUM_BINS // 2] == 7
    assert counted.counts.sum() == 8
