"""The encode benchmark: the model that it stands for, scaling, and schemes that are read."""

from __future__ import annotations

import argparse

import pytest

from service.numerics.schemes import parse_scheme
from tests.benchmarks.bench_encode import MAX_SECONDS, NUM_PARAMETERS, Measured, row_of, share_of_one


def test_parameters_are_those_of_tinyllama_without_its_norms() -> None:
    assert NUM_PARAMETERS == 1_100_048_384 - 45 * 2048


def test_seconds_are_scaled_by_parameters() -> None:
    row = row_of("w4a16", Measured(2.0, NUM_PARAMETERS // 4))
    assert (row["scheme"], row["seconds"], row["measured_s"]) == ("w4a16-g64", 8.0, 2.0)


def test_every_scheme_is_there_once() -> None:
    schemes = [parse_scheme(name) for name in MAX_SECONDS]
    assert len(set(schemes)) == len(schemes)
    assert {scheme.fit for scheme in schemes} == {"rtn", "mse", "hqq"}


@pytest.mark.parametrize("text", ["0", "-1", "1.5"])
def test_a_share_is_above_0_and_at_most_1(text: str) -> None:
    assert share_of_one("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="must be above 0 and at most 1"):
        share_of_one(text)
