"""Choice of tokens by the kernels against the same by torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from service.engine import choice
from service.engine.sequence import SamplingParams
from service.kernels import dispatch
from tests.kernels.support import computing_with

LIMITS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 1e-45},
    {"top_k": 1},
    {"top_k": 50, "temperature": 2.0},
    {"top_k": 3000},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.0001},
    {"min_p": 1.0},
    {"top_k": 100, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
    {"top_p": 0.99, "min_p": 0.01},
]


needs_library = pytest.mark.skipif(dispatch.kernel_name() == "torch", reason="there is no kernel library")


def make_logits(vocab_size: int) -> Tensor:
    """As spread as a model's, with many ties, with tokens that are ruled out, and with one that is left."""
    logits = 3 * torch.randn((4, vocab_size), generator=torch.Generator().manual_seed(vocab_size))
    logits[1].round_()
    logits[2, 1::2] = -math.inf
    logits[3, 1:] = -math.inf
    return logits


@needs_library
@pytest.mark.parametrize("vocab_size", [1, 17, 1024, 5003])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_kernels_draw_what_torch_draws(limits: dict[str, Any], vocab_size: int) -> None:
    logits = make_logits(vocab_size)
    rows = [3, 0, 2, 1, 0, 2]
    params = [SamplingParams(max_tokens=1, **limits)] * len(rows)
    for uniforms in torch.rand((20, len(rows)), dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        found = choice.draw(logits, rows, params, uniforms.tolist())
        with computing_with("torch"):
            assert choice.draw(logits, rows, params, uniforms.tolist()) == found


@needs_library
@pytest.mark.parametrize("vocab_size", [1, 17, 1024, 5003])
def test_kernels_find_the_peaks_that_torch_finds(vocab_size: int) -> None:
    logits = make_logits(vocab_size)
    found = choice.find_peaks(logits)
    with computing_with("torch"):
        assert choice.find_peaks(logits) == found
    assert found.tokens == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("isa", ["auto", "torch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_bad_logit_is_seen_in_its_row_alone(isa: str, bad: float) -> None:
    logits = make_logits(3001)
    logits[1, 2999] = bad
    with computing_with(isa):
        peaks = choice.find_peaks(logits).logits
    assert [math.isfinite(peak) for peak in peaks] == [True, False, True, True]
