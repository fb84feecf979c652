"""Every causal language model type of transformers, tiny, through the whole service: it becomes what the list says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.families.listed import Listed, read_list
from tests.families.sweep import MIN_QUANTIZED_SHARE, NOT_BUILT, REFUSED, Outcome, sweep

LISTED = read_list()
OUTPUT_VARIABLE = "FAMILIES_OUTPUT"
"""Names a file for the outcomes of the types that ran."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Outcome]]:
    found: dict[str, Outcome] = {}
    yield found
    if path := os.environ.get(OUTPUT_VARIABLE):
        rows = {model_type: asdict(outcome) for model_type, outcome in sorted(found.items())}
        Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("model_type", "listed"), LISTED.items(), ids=LISTED)
def test_a_type_is_served_or_refused_as_it_is_listed(
    model_type: str, listed: Listed, tmp_path: Path, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes[model_type] = sweep(model_type, tmp_path)
    assert outcome.result == listed.result, outcome.reason
    assert listed.message in outcome.reason
    assert bool(listed.unquantized_only) == bool(outcome.quantized), outcome.quantized
    assert listed.unquantized_only in outcome.quantized
    if outcome.result not in (REFUSED, NOT_BUILT):
        assert outcome.num_distinct > 2, "outputs that hardly vary prove little"
        assert outcome.quantized or outcome.quantized_share >= MIN_QUANTIZED_SHARE
