"""Percentiles against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.reports.percentiles import Percentiles, percentile, percentiles_of


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_percentile_is_numpys_inverted_distribution(values: list[float], ratio: float) -> None:
    assert percentile(values, ratio) == np.percentile(values, 100 * ratio, method="inverted_cdf")


def test_the_three_percentiles_are_values_that_occurred() -> None:
    assert percentiles_of([float(value) for value in range(100, 0, -1)]) == Percentiles(50.0, 90.0, 99.0)


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_one_value_is_every_percentile(value: float) -> None:
    assert percentiles_of([value]) == Percentiles(value, value, value)


def test_nothing_measured_is_no_percentile() -> None:
    assert percentiles_of([]) is None
