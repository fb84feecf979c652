"""How far one distribution over a vocabulary is from another, from logits that come in pieces of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


class Divergence:
    """KL(p || q) in nats and agreement of the likeliest token, row by row, of p = softmax(a) and q = softmax(b).

        KL = sum p (a - b) - log sum exp a + log sum exp b

    Sums are kept in float64, shifted by the largest logit so far: the two last terms nearly cancel.

    Args:
        num_rows: of the logits, one for each token.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._a, self._b = _Normalizer(num_rows, device), _Normalizer(num_rows, device)
        self._weighted = torch.zeros(num_rows, dtype=torch.float64, device=device)  # sum of exp(a - top) (a - b)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take the next columns of both: float[rows, columns], a token that cannot be is -inf."""
        a, b = a.double(), b.double()
        self._weighted *= self._a.add(a)
        self._b.add(b)
        shares = (a - self._a.top[:, None]).exp_()
        differences = torch.where(a == -torch.inf, 0, a - b)
        self._weighted += (shares * differences).sum(-1)

    def kl(self) -> Tensor:
        """Nats, float64[rows]; not below 0."""
        return (self._weighted / self._a.total - self._a.log_total() + self._b.log_total()).clamp_(min=0)

    def log_totals(self) -> tuple[Tensor, Tensor]:
        """Logs of the sums of exponentials of a and of b: float64[rows] each; a logit less this is its logprob."""
        return self._a.log_total(), self._b.log_total()

    def agrees(self) -> Tensor:
        """Whether both find the same token likeliest, the first of equals: bool[rows]."""
        return self._a.likeliest == self._b.likeliest


class _Normalizer:
    """Log of the sum of exponentials of the columns so far, and where the largest stands."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        least = torch.finfo(torch.float64).min  # finite, so that a piece of nothing but -inf can be shifted by it
        self.top = torch.full((num_rows,), least, dtype=torch.float64, device=device)
        self.total = torch.zeros(num_rows, dtype=torch.float64, device=device)  # of exp(logit - top)
        self.likeliest = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._num_columns = 0

    def add(self, logits: Tensor) -> Tensor:
        """Take columns; what the shift of the sums so far is to be multiplied with: float64[rows]."""
        values, places = logits.max(-1)
        is_larger = values > self.top
        self.likeliest = torch.where(is_larger, places + self._num_columns, self.likeliest)
        top = torch.where(is_larger, values, self.top)
        factor = (self.top - top).exp_()
        self.top = top
        self.total = self.total * factor + (logits - top[:, None]).exp_().sum(-1)
        self._num_columns += logits.shape[1]
        return factor

    def log_total(self) -> Tensor:
        """Log of the sum: float64[rows]."""
        return self.top + self.total.log()
