"""Chooses next tokens from logits, for all sequences of a step at once."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from service.engine.batch import Token
from service.engine.candidates import draw, likeliest
from service.engine.logprobs import read_logprobs
from service.engine.penalties import Adjuster
from service.engine.sequence import Sequence, TokenLogprobs


class Sampler:
    """Samples, and keeps the random generator and the history of each sequence. Owned by the engine thread.

    One uniform number of a sequence's own generator is spent per sampled token, so what a seed
    gives does not depend on its neighbours.
    """

    def __init__(self) -> None:
        self._generators: dict[str, torch.Generator] = {}
        self._adjuster = Adjuster()

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> list[Token | None]:
        """Choose a token for each row.

        Args:
            logits: float32[rows, vocab]; overwritten.
            sequences: of each row; they are read, and the tokens are not added to them.

        Returns:
            A token for each row; None where the logits have NaN, +inf or nothing but -inf.
        """
        asking = [row for row, sequence in enumerate(sequences) if sequence.params.num_logprobs is not None]
        unchanged = _copy(logits, asking) if asking else None
        logits, peaks = logits.contiguous(), logits.amax(1)  # NaN counts as the largest value
        self._adjuster.apply(logits, sequences)
        tokens = self._choose(logits, sequences, (peaks.isfinite() & logits.amax(1).isfinite()).tolist())
        logprobs: dict[int, TokenLogprobs] = {}
        if unchanged is not None:
            chosen = [tokens.get(row, 0) for row in asking]
            counts = [sequences[row].params.num_logprobs or 0 for row in asking]
            logprobs = dict(zip(asking, read_logprobs(unchanged, chosen, counts), strict=True))
        return [Token(tokens[row], logprobs.get(row)) if row in tokens else None for row in range(len(sequences))]

    def _choose(self, logits: Tensor, sequences: Seq[Sequence], is_usable: Seq[bool]) -> dict[int, int]:
        """Tokens of the usable rows."""
        rows = [row for row, usable in enumerate(is_usable) if usable]
        greedy = [row for row in rows if sequences[row].params.temperature == 0]
        random = [row for row in rows if sequences[row].params.temperature > 0]
        tokens: dict[int, int] = {}
        if greedy:
            tokens |= zip(greedy, likeliest(_rows(logits, greedy)).tolist(), strict=True)
        if random:
            params = [sequences[row].params for row in random]
            uniforms = torch.stack([self._uniform(sequences[row]) for row in random]).to(logits.device)
            tokens |= zip(random, draw(_rows(logits, random), params, uniforms).tolist(), strict=True)
        return tokens

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence that has ended."""
        self._generators.pop(request_id, None)
        self._adjuster.forget(request_id)

    def _uniform(self, sequence: Sequence) -> Tensor:
        """The next float64[] in [0, 1) of a sequence's own."""
        generator = self._generators.get(sequence.request_id)
        if generator is None:
            generator = self._generators[sequence.request_id] = torch.Generator()
            if sequence.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sequence.params.seed)
        return torch.rand((), dtype=torch.float64, generator=generator)


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """Some rows; no copy if they are all."""
    return logits if len(rows) == len(logits) else _copy(logits, rows)


def _copy(logits: Tensor, rows: list[int]) -> Tensor:
    return logits.index_select(0, torch.tensor(rows, device=logits.device))
