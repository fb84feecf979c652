"""KL and agreement from pieces of the vocabulary, held against torch's own functions on the whole of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from service.numerics.divergence import Divergence

CPU = torch.device("cpu")


def logits(seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(5, 100, generator=torch.Generator().manual_seed(seed)) * spread


def measured(a: Tensor, b: Tensor, step: int) -> Divergence:
    divergence = Divergence(len(a), CPU)
    for left, right in zip(a.split(step, -1), b.split(step, -1), strict=True):  # type: ignore[no-untyped-call]
        divergence.add(left, right)
    return divergence


def kl(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("step", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize("distance", [1e-4, 0.1, 10.0])
def test_pieces_give_the_divergence_of_the_whole(step: int, distance: float) -> None:
    a = logits(0)
    b = a + distance * logits(1, 1.0) + 100  # a shift changes no distribution
    found = measured(a, b, step)
    assert torch.allclose(found.kl(), kl(a, b), rtol=1e-9, atol=1e-13)
    assert torch.equal(found.agrees(), a.argmax(-1) == b.argmax(-1))


def test_the_same_logits_do_not_diverge() -> None:
    found = measured(logits(0, 30.0), logits(0, 30.0), 9)
    assert found.kl().max() < 1e-12
    assert found.agrees().all()


def test_it_is_not_the_same_the_other_way_round() -> None:
    a, b = logits(0), logits(1)
    assert not torch.allclose(measured(a, b, 10).kl(), measured(b, a, 10).kl(), rtol=0.01)


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min], ids=["infinite", "least"])
def test_tokens_that_cannot_be_count_nothing(mask: float) -> None:
    a, b = logits(0), logits(1)
    expected = kl(a[:, 40:], b[:, 40:])
    a[:, :40] = b[:, :40] = mask
    assert torch.allclose(measured(a, b, 20).kl(), expected, rtol=1e-9)


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    a, b = torch.zeros(1, 10), torch.zeros(1, 10)
    a[0, [3, 8]] = b[0, [3, 8]] = 1.0
    assert measured(a, b, 5).agrees().all()
    b[0, 3] = 0.5
    assert not measured(a, b, 5).agrees().any()
